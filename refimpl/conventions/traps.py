"""The 22 traps: who does what. `READ` says in which versions."""

from __future__ import annotations

from . import examples as ex
from .trap import Trap

__all__ = ["READ", "TRAPS"]

READ = (
    "DeepSeek-V3 9b4e978, DeepSeek-V3.2-Exp 3b99a53, TileKernels 36d9e45, transformers "
    "5.24.0, Megatron-LM d98e8a6, torchtitan b5bcd76, TRL 1.16.0, verl 0.9.1, OpenRLHF "
    "3c3be62, SGLang 0.5.23, vLLM of about September 2025; of the modelling files beside "
    "DeepSeek's weights only DeepSeek-VL2's copy, 8ed2d7f"
)
MAIN = "main loss"
RECORD = "`Conventions.{}`".format

TRAPS = (
    Trap(
        "MTP's order",
        "Which comes first in front of the MTP module's projection `eh_proj`?",
        {
            "DeepSeek": "the embedding: the released weights expect it (sglang#6423)",
            "paper": "the hidden state (V3 eq. 21)",
            "HF": "the embedding (`MtpLayer`, modeling_layers.py)",
            "Megatron": (
                "the embedding (`_concat_embeddings`, multi_token_prediction.py; Megatron-LM#1588)"
            ),
            "torchtitan": "the embedding (deepseek_v3/mtp.py)",
            "vLLM, SGLang": "the embedding (deepseek_mtp.py, deepseek_nextn.py)",
        },
        RECORD("mtp_order"),
        "embedding_hidden",
        "swap the two halves of `eh_proj`'s columns: with released weights the wrong order "
        "drafts nonsense.",
        (("loss of MTP module 1", ex.mtp_order),),
    ),
    Trap(
        "MTP's hidden state",
        "Does an MTP module read the previous depth's state before or after its norm?",
        {
            "paper": "does not say (DeepSeek-V3#839)",
            "HF": "after: the main model's final norm, then each module's own (`MtpModel`)",
            "Megatron": (
                "after, as HF (transformer_block.py; `_postprocess`, multi_token_prediction.py)"
            ),
            "torchtitan": (
                "before it for module 1, deliberately; after it for later ones "
                "(`MTPDecoder.forward`)"
            ),
            "SGLang": "after, as far as its callers show",
            "vLLM": (
                "after the final norm for module 1 (second-hand); hands on the raw state from there"
            ),
        },
        RECORD("mtp_hidden"),
        "normed",
        "`model.norm.weight` gets a part of its gradient from the MTP loss (normed), or none "
        "(raw). With norm weights of one the states differ in size alone, which the module's "
        "`hnorm` takes out again.",
        (("loss of MTP module 2", ex.mtp_hidden),),
    ),
    Trap(
        "MTP's normaliser",
        "Module k has T − k targets. What is the sum of their losses divided by?",
        {
            "paper": (
                "T, the positions that predict, where token T + 1 is known (V3 eq. 24); λ "
                "0.3 for 10T tokens, then 0.1"
            ),
            "Megatron": "the module's own valid targets (`process_mtp_loss`); λ 0.1 by default",
            "torchtitan": "the main loss's valid targets (`MTPLoss`), λ 0.3",
            "HF": (
                "sums the modules' losses without λ (`MtpModel`); as written, labels raise "
                "(read, not run)"
            ),
            "verl": "Megatron's (mtp_patch.py)",
        },
        RECORD("mtp_normaliser"),
        "positions",
        "a constant loss c a token, one module, four positions, the token after the last "
        "given: 0.75 c, or c. From the tokens alone the last target is missing, and "
        "`positions` gives 0.5 c; `main` then divides by the 3 that predict.",
        (("loss of MTP module 1", ex.mtp_normaliser),),
    ),
    Trap(
        "MTP at position 0",
        "Is the embedding that an MTP module reads zeroed where the position is 0?",
        {
            "paper": "no",
            "HF": "no",
            "Megatron": "no",
            "torchtitan": "no",
            "SGLang": "no",
            "vLLM": "yes",
        },
        RECORD("mtp_zero_first_embedding"),
        "False",
        "change the second token alone: under True the module's output at position 0 does not "
        "move.",
        (("loss of MTP module 1", ex.mtp_zero_first_embedding),),
    ),
    Trap(
        "Hidden groups",
        "What do the experts of the groups that were not chosen score: −∞ or 0?",
        {
            "DeepSeek": "−∞ (`Gate`, inference/model.py); early versions 0 (DeepSeek-V3#741)",
            "paper": "they take no part",
            "HF": (
                "−∞ since transformers#45441, 0 before; V2 still 0, on softmax scores, "
                "where it is harmless"
            ),
            "Megatron": "−∞ (moe_utils.py)",
            "torchtitan": "−∞ (common/moe.py)",
            "SGLang": "−∞ with a bias; 0 before sglang#3705 (vLLM: vllm#13474)",
        },
        RECORD("masked_groups"),
        "-inf",
        "add one negative constant to all biases: under −∞ no choice changes. V3's own biases "
        "are all positive (about 2 at least, transformers#45441), so its weights show nothing.",
        ((f"{MAIN}, biases about −1", ex.masked_groups),),
    ),
    Trap(
        "The latents' norms",
        "Are the query and key-value latents normed?",
        {
            "DeepSeek": "yes, both; never the rotated key",
            "paper": (
                "not in the equations (V3 eq. 1–11); section 4.2 mentions them. No value "
                'is published for the "scaling at the width bottlenecks" beside them, and '
                "no code has any"
            ),
            "HF": "yes",
            "Megatron": "yes",
            "torchtitan": "yes",
            "SGLang": "yes",
        },
        "fixed: yes",
        "normed",
        "multiply `kv_a_proj_with_mqa`'s first rows by 2: with the norm (and eps 0) nothing "
        "changes.",
        ((MAIN, ex.latent_norms),),
    ),
    Trap(
        "When YaRN applies",
        "With a configured length within the original context, is YaRN on?",
        {
            "DeepSeek": (
                "no: only if max_seq_len exceeds the original context, frequencies and "
                "mscale alike; the file beside the weights: yes"
            ),
            "HF": "yes, whenever it is configured (`_compute_yarn_parameters`)",
            "Megatron": (
                "yes; MLA's default is YaRN with factor 40, so even unasked (transformer_config.py)"
            ),
            "torchtitan": "yes since 2026-08-11 (torchtitan#4117), no before",
            "SGLang": "yes",
        },
        RECORD("yarn_when"),
        "beyond_original",
        "the logits of a short prompt with `max_position_embeddings` 4096 and 8192: equal "
        "(always, or never), or not.",
        ((f"{MAIN}, max_positions = original", ex.yarn_when),),
    ),
    Trap(
        "YaRN's mscale",
        "What does YaRN's temperature multiply, and by which constant?",
        {
            "DeepSeek": (
                "the softmax scale, by (0.1 m ln 40 + 1)²; m is 1.0 for V3 and the 236B "
                "config, 0.707 for the 16B"
            ),
            "paper": (
                "YaRN on the rotated key alone; all code rotates queries too. V2: √t = "
                "0.0707 ln 40 + 1"
            ),
            "HF": (
                "as DeepSeek, m = `mscale_all_dim`; deepseek_v2 ignored it before "
                "transformers#47435. Cos and sin are multiplied by m(mscale) / "
                "m(mscale_all_dim), or by m(1) if one of them is 0. V2's config.json has "
                "0.707 for all sizes (llama.cpp#7118)"
            ),
            "Megatron": (
                "m = `mscale_all_dim`, 0 by default, and cos and sin by the ratio of the "
                "two mscales, 1.369 by default: the rotated part of a score is 1.874 "
                "times larger, the rest is not (multi_latent_attention.py; worked out "
                "from its code, not run)"
            ),
            "torchtitan": "as DeepSeek; its 16B has 0.70, not 0.707",
        },
        "`Yarn.mscale`, `Yarn.mscale_all_dim`, " + RECORD("yarn_factor"),
        "1.0, 1.0, ratio",
        "logits agree at position 0 alone, where the softmax has one entry: test later positions.",
        (
            ("softmax scale at 192 wide heads", ex.mscale),
            (MAIN, ex.mscale_default),
            (f"{MAIN}, mscale 0.5, mscale_all_dim 0", ex.yarn_factor),
        ),
    ),
    Trap(
        "The balance loss's counts",
        "What does f_i of the sequence-wise balance loss count?",
        {
            "paper": "the K best unbiased scores, without groups (V3 eq. 18); α = 1e-4",
            "DeepSeek": (
                "the modelling file beside the weights counts the routed experts, and "
                "does not normalise the scores. One config of V3-0324 is said to have α = "
                "0.001, others nothing, which reads as 0"
            ),
            "HF": "none",
            "Megatron": (
                "as the paper (`compute_routing_scores_for_aux_loss`); α = 0 and a "
                "batch-wise loss by default"
            ),
            "torchtitan": "no balance loss, the bias alone",
            "TileKernels": (
                "the ids that it is given; −1 is left out of the counts and not of the "
                "divisor (aux_fi_kernel.py)"
            ),
        },
        RECORD("balance_counts"),
        "unbiased",
        "give one expert a large bias: under `unbiased` the loss does not change.",
        (("sum of the balance losses", ex.balance_counts),),
    ),
    Trap(
        "The bias's update",
        "Is the mean subtracted from the change of the gate's biases?",
        {
            "DeepSeek": "no code",
            "paper": (
                "no: b_i += γ sign(mean load − load_i) (V3 2.1.2), γ 0.001 for 14.3T tokens, then 0"
            ),
            "HF": "never updated: a buffer; an export that zeroes it loses the routing",
            "Megatron": (
                "no; once an optimiser step (`get_updated_expert_bias`); counts where "
                "gradients are recorded, so re-entrant recomputation counts once"
            ),
            "torchtitan": (
                "yes (`_update_expert_bias`); counts recomputed forwards, and halves the loads then"
            ),
        },
        "`bias_update(centre=…)`, " + RECORD("bias_centre"),
        "False",
        "after a step the biases of a layer sum to 0 only if centred. A forward that is "
        "recomputed must not count its loads twice.",
        (("change of the busiest expert's bias, loads 9, 1, 1, 1", ex.bias_centre),),
    ),
    Trap(
        "The gate's precision",
        "In which type is the gate computed, and what is added to the sum of the chosen scores?",
        {
            "DeepSeek": (
                "the model's type, bfloat16, scores too (the bias is float32 since "
                "2025-08-26); V3.2-Exp: float32. V3's adds nothing. TileKernels: float32, "
                "its sum starts at 1e-20 (top2_sum_gate_kernel.py)"
            ),
            "HF": "float32; adds 1e-20 (`DeepseekV3TopkRouter`)",
            "Megatron": (
                "the input's type unless `moe_router_dtype` is set, scores float32; adds "
                "1e-20 unless top-k is 1 (moe_utils.py)"
            ),
            "torchtitan": (
                "float32 (before 2026-04-02: product in the model's type); adds 1e-20 "
                "(common/moe.py)"
            ),
        },
        RECORD("gate_epsilon") + "; the type is the arrays'",
        "0",
        "compare routes, not logits: a token whose 8th and 9th scores are close changes an "
        "expert. To compare gradients across precisions, replay the routes "
        "(`forward(routes=…)`).",
        (
            ("% of tokens with another set of experts (64, top 8)", ex.gate_precision),
            ("weight of an expert if all scores underflow", ex.gate_epsilon),
        ),
    ),
    Trap(
        "The gate's switches",
        "When does the gate have a bias, how is a group scored, what does norm_topk_prob do?",
        {
            "DeepSeek": (
                "a bias only if the width is 7168, so a shrunken config silently loses "
                "it; groups by their two best with a bias, by the best without (`Gate`, "
                "inference/model.py)"
            ),
            "paper": "the sum of a group's best K / kept groups",
            "HF": (
                "V3: always a bias, two best. V2: none, the best, and norm_topk_prob does "
                "nothing (the file beside V2's weights: normalised, then not scaled); no "
                "released V2 sets it"
            ),
            "Megatron": "the best K // kept groups, bias or not",
            "torchtitan": "the two best, bias or not",
            "TileKernels": "the two best",
        },
        "`ModelConfig.gate_bias`, `.group_score`, " + RECORD("softmax_normalise"),
        "True, top2, scaled",
        "top-3 of two kept groups: `share` takes one score a group, `top2` two.",
        ((MAIN, ex.gate_bias), (f"{MAIN}, softmax gate with norm_topk_prob", ex.softmax_normalise)),
    ),
    Trap(
        "The routed experts that don't run",
        "Does the modelling code in DeepSeek's checkpoints run the experts in training?",
        {
            "DeepSeek": (
                "the file beside the V3 weights asserts that it is not training; with "
                "that line patched out only the shared expert runs (LLaMA-Factory#6829; "
                "the same assert is in DeepSeek-VL2's file)"
            ),
            "HF": "native code runs both",
            "Megatron": "both",
            "torchtitan": "both",
        },
        "fixed: both",
        "both",
        "the routed experts' gradients are all zero.",
        ((MAIN, ex.routed_branch),),
    ),
    Trap(
        "FP8's scales",
        "How is a stored FP8 weight read?",
        {
            "DeepSeek": (
                "`weight_scale_inv` multiplies, in spite of its name (`weight_dequant`); "
                "`act_quant` had no floor under amax before 2025-08-28, so a tile of "
                "zeros was 0/0"
            ),
            "paper": "an online amax a tile, 1 × 128 and 128 × 128 (V3 3.3)",
            "HF": "multiplies",
            "vLLM, SGLang": "multiply",
        },
        "fixed: multiplies; floor 1e-4",
        "–",
        "weights of magnitude 1e-2 against 1e6.",
        (
            ("largest weight of a tile, 0.05 before", ex.weight_scale_inv),
            ("a tile of zeros, quantised", ex.amax_floor),
        ),
        checkpoint=True,
    ),
    Trap(
        "Active parameters",
        'What do the "37B active" count?',
        {
            "DeepSeek": (
                "README_WEIGHTS: 36.7B with embedding and head, 0.9B each, which is neither sum"
            ),
            "paper": "37B",
        },
        "`refimpl count v3`",
        "both are printed",
        "recount.",
        (("billions", ex.active_parameters),),
    ),
    Trap(
        "GRPO's level",
        "Is the ratio a token's or an output's, and how are tokens averaged?",
        {
            "paper": (
                "DeepSeekMath: tokens, mean over each output, then over outputs. V3 and "
                "R1 print a ratio of whole outputs and no 1/|o|"
            ),
            "TRL": (
                "`loss_type` dapo (all tokens alike), β 0; ratio of tokens, or the |o|-th "
                "root of the output's (GSPO); grpo_config.py, `_compute_loss`"
            ),
            "verl": (
                "mean over all tokens, dual clip at 3, no KL loss unless asked; others by "
                "`loss_agg_mode` (core_algos.py)"
            ),
            "torchtitan": "its GRPO is DAPO with a symmetric clip, no KL (experiments/rl/losses)",
            "OpenRLHF": "mean over all tokens, no dual clip (`PolicyLoss`)",
            "nobody": "the product over an output, which V3 and R1 print, is in none of them",
        },
        "`grpo_forward(ratio=, average=)`, `GRPO_PRESETS`",
        "token, sequence",
        "outputs of 1 and 9 tokens with opposite advantages, on-policy: 0 if outputs weigh "
        "alike, not if tokens do.",
        (("loss of four outputs", ex.grpo_level),),
    ),
    Trap(
        "The advantage's deviation",
        "Divided by G or G − 1, plus which ε, and what does a group of one get?",
        {
            "paper": '"std", nothing more',
            "TRL": "G − 1, ε 1e-4; a group of one gets 0 (`nanstd`)",
            "verl": "G − 1, ε 1e-6; a group of one gets its reward: mean 0, deviation 1 "
            "(`compute_grpo_outcome_advantage`)",
            "torchtitan": "no deviation by default; if asked, G, ε 1e-6",
            "OpenRLHF": "G − 1, ε 1e-9; refuses a group of one (train_ppo_ray.py)",
        },
        "`group_advantages(ddof=, epsilon=, alone=)`",
        "1, 0, 0",
        "rewards 1 and 0: advantages of ±0.707 (G − 1) or ±1 (G).",
        (
            ("advantage of reward 1 among 1, 0, 0, 1", ex.advantage_std),
            ("a group of one, reward 1", ex.group_of_one),
        ),
    ),
    Trap(
        "k3 and its bounds",
        "Is the KL estimate clamped, and is its gradient the KL's?",
        {
            "paper": (
                "DeepSeekMath: r − ln r − 1, unclamped; its mean gradient is that of "
                "KL(π_ref‖π), not of KL(π‖π_ref). V3.2 multiplies it by the ratio, and it "
                "is"
            ),
            "TRL": (
                "unclamped, so it can be infinite (trl#3015, trl#6637); times the ratio by "
                "default in 1.16 (`use_bias_correction_kl`, trl#6503)"
            ),
            "verl": (
                "clamps the log-ratio to ±20 and k3 to 10: beyond ln r ≈ 2.6 no gradient "
                "is left (`kl_penalty_forward`)"
            ),
            "OpenRLHF": (
                "clamps the value to ±10; by default k1 in the reward, not in the loss "
                "(`compute_approx_kl`)"
            ),
        },
        "`grpo_forward(kl=, kl_bounds=)`",
        "k3, none",
        "one token with ln(π_ref/π) = 3: 16.09, or 10 with a gradient of exactly 0.",
        (("pull on a token that the reference finds e³ times likelier", ex.kl_gradient),),
    ),
    Trap(
        "The clip's width",
        "How far may the ratio move?",
        {
            "paper": (
                "R1's first stage is reported to have ε = 10; 1 − ε is negative, so only "
                "A > 0 with a ratio above 11 is clipped"
            ),
            "TRL": "0.2",
            "verl": "0.2, and ratios above 3 where A < 0",
            "torchtitan": "0.2",
            "OpenRLHF": "0.2",
        },
        "`grpo_forward(clip=)`",
        "0.2, 0.2",
        "the share of clipped tokens.",
        (("loss of four outputs, no KL", ex.clip_width),),
    ),
    Trap(
        "MLA as it is taught",
        "Does MLA have a rotated part, latent norms, and compressed queries at inference?",
        {
            "DeepSeek": (
                "rotated part and norms always; compressed queries in V2 and V3, not in V2-Lite"
            ),
            "paper": (
                "rotated part and compressed queries (V2 eq. 9–19), at inference too; norms: see 6"
            ),
            "HF": "as DeepSeek",
            "Megatron": "as DeepSeek",
            "torchtitan": "as DeepSeek",
            "teaching code": (
                "rasbt/LLMs-from-scratch (ch04/05_mla) has no RoPE, no norm of the latent "
                "and whole queries, and says that queries are compressed in training alone"
            ),
        },
        "`ModelConfig.q_latent`; the others fixed",
        "as the config says",
        "without the rotated part attention does not know the order of the tokens before it.",
        ((MAIN, ex.rotation),),
    ),
    Trap(
        "The latent norms' eps",
        "Do the two latent norms take the config's `rms_norm_eps`?",
        {
            "DeepSeek": (
                "its inference code has 1e-6 for every norm; the file beside the weights as HF"
            ),
            "HF": "no: their class's default of 1e-6 (`DeepseekV2Attention`)",
            "Megatron": "yes",
            "torchtitan": "no: 1e-5 for every norm, whatever the checkpoint says",
            "SGLang": "yes",
        },
        RECORD("latent_eps"),
        "config",
        "nothing on V3 (1e-6). Moonlight's config is said to have 1e-5. Scale the input down "
        "until a latent's mean square is near eps.",
        (("root mean square of a normed latent of std 0.006, eps 1e-5", ex.latent_eps),),
    ),
    Trap(
        "float64 that is not",
        "Is a model in float64 computed in float64?",
        {
            "HF": "no: norms, gate, softmax, rotation and loss cast to float32 inside",
            "Megatron": "the gate's scores are float32",
            "torchtitan": "the gate is float32",
        },
        "fixed: float64 stays float64",
        "–",
        "a difference of 1e-7 that does not shrink from float32 to float64.",
        (("largest relative change of a logit", ex.hidden_float32),),
    ),
)
