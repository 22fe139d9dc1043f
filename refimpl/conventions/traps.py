"""The 37 traps: who does what, how that is known, and of which version (`VERSIONS`)."""

from __future__ import annotations

from . import examples as ex
from .trap import Trap, read, run, told

__all__ = ["TRAPS"]

DRAWN = "tests/oracle/test_hugging_face.py::test_drawn_configurations"
TRAINING = "tests/oracle/test_hugging_face.py::test_training_loss"
ORACLE = "tests/oracle/test_conventions.py::{}".format
TRL = "tests/peers/test_trl.py::{}".format
VERL = "tests/peers/test_verl.py::{}".format
TITAN = "tests/peers/test_torchtitan.py::{}".format
MEGATRON = "tests/peers/test_megatron.py::{}".format
WHOLE = TITAN("test_the_whole_model")
V3_2 = "DeepSeek-V3.2-Exp 3b99a53"
BESIDE = "DeepSeek-VL2 8ed2d7f"  # its copy of the modelling file beside DeepSeek's weights
MAIN = "main loss"
RECORD = "`Conventions.{}`".format
SPLITS = "tests/oracle/test_splits.py::{}".format
IN_PARTS = (
    "`splits.whole_of(parts)` and `forward(whole=)`; a split of `refimpl grads` names the others"
)
RECIPE = "`Recipe.{}`".format
FP8_WORDS = "FP8 E4M3 quantised quantisation"
SPLIT_WORDS = "split micro-batch microbatch accumulation ranks data parallel context parallel"

TRAPS = (  # every row of the page
    Trap(
        "MTP's order",
        "Which comes first in front of the MTP module's projection `eh_proj`?",
        {
            "DeepSeek": told("the embedding: the released weights expect it (sglang#6423)"),
            "paper": read("the hidden state (V3 eq. 21)"),
            "HF": run(
                "the embedding, unless the config has `mtp_hidden_states_first`: DeepSeek's have "
                "not, Inkling's has (`MtpLayer`, modeling_layers.py)",
                test=TRAINING,
            ),
            "Megatron": run(
                "the embedding (`_concat_embeddings`, multi_token_prediction.py; Megatron-LM#1588)",
                test=MEGATRON("test_mtp_order"),
            ),
            "torchtitan": run("the embedding (deepseek_v3/mtp.py)", test=WHOLE),
            "vLLM": read("the embedding (deepseek_mtp.py)"),
            "SGLang": read("the embedding (deepseek_nextn.py)"),
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
            "DeepSeek": told("before it, at every depth (llama.cpp#24025)"),
            "paper": read("does not say (DeepSeek-V3#839)"),
            "HF": run(
                "after: the main model's final norm, then each module's own (`MtpModel`)",
                test=TRAINING,
            ),
            "Megatron": read(
                "after, as HF (transformer_block.py; `_postprocess`, multi_token_prediction.py)"
            ),
            "torchtitan": run(
                "before it for module 1, deliberately; after it for later ones: `raw_first` "
                "(`MTPDecoder.forward`)",
                test=WHOLE,
            ),
            "SGLang": read("after its own norm (deepseek_nextn.py)", at="SGLang 0114f9c"),
            "vLLM": read(
                "the model file hands on the raw state, after a start that its callers take behind "
                "the final norm: `normed_first` (deepseek_mtp.py). Since vllm#45895 normed "
                "throughout, its description says"
            ),
        },
        RECORD("mtp_hidden"),
        "normed",
        "`model.norm.weight` gets a part of its gradient from the MTP loss (normed), or none "
        "(raw). With norm weights of one the states differ in size alone, which the module's "
        "`hnorm` takes out again.",
        (("loss of MTP module 2", ex.mtp_hidden),),
        words="chain vLLM raw normed_first drafts",
    ),
    Trap(
        "MTP's normaliser",
        "Module k has T − k targets. What is the sum of their losses divided by?",
        {
            "paper": read(
                "T, the positions that predict, where token T + 1 is known (V3 eq. 24); λ "
                "0.3 for 10T tokens, then 0.1"
            ),
            "Megatron": run(
                "the module's own valid targets (`process_mtp_loss`); λ 0.1 by default",
                test=MEGATRON("test_mtp_normaliser_and_tail"),
            ),
            "torchtitan": run(
                "the main loss's valid targets, still (`MTPLoss`); λ 0.3", test=WHOLE
            ),
            "HF": run(
                "nothing: with labels it raises TypeError, adding a loss to None "
                "(`MtpModel.forward`)",
                test=ORACLE("test_labels_of_mtp_raise"),
            ),
            "verl": read("Megatron's (mtp_patch.py)"),
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
            "paper": read("no"),
            "HF": run("no", test=TRAINING),
            "Megatron": run("no", test=MEGATRON("test_mtp_order")),
            "torchtitan": run("no", test=WHOLE),
            "SGLang": read("no", at="SGLang 0114f9c"),
            "vLLM": read("yes (deepseek_mtp.py)"),
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
            "DeepSeek": read("−∞ (`Gate`, inference/model.py); early versions 0 (DeepSeek-V3#741)"),
            "paper": read("they take no part"),
            "HF": run(
                "−∞ since transformers#45441, 0 before; V2 still 0, on softmax scores, "
                "where it is harmless",
                test=DRAWN,
            ),
            "Megatron": run(
                "−∞ (`group_limited_topk`, moe_utils.py)", test=MEGATRON("test_the_gate")
            ),
            "torchtitan": run("−∞ (common/moe.py)", test=WHOLE),
            "SGLang": read(
                "−∞ with a bias; 0 before sglang#3705 (moe/topk.py)", at="SGLang 000328a"
            ),
            "vLLM": told("0 before vllm#13474"),
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
            "DeepSeek": read("yes, both; never the rotated key"),
            "paper": read(
                "not in the equations (V3 eq. 1–11); section 4.2 mentions them. No value "
                'is published for the "scaling at the width bottlenecks" beside them, and '
                "no code has any"
            ),
            "HF": run("yes", test=DRAWN),
            "Megatron": read("yes"),
            "torchtitan": run("yes", test=WHOLE),
            "SGLang": read("yes"),
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
            "DeepSeek": read(
                "no: only if max_seq_len exceeds the original context, frequencies and "
                "mscale alike; the file beside the weights: yes"
            ),
            "HF": run("yes, whenever it is configured (`_compute_yarn_parameters`)", test=DRAWN),
            "Megatron": run(
                "yes; MLA's default is YaRN with factor 40, so even unasked "
                "(transformer_config.py)",
                test=MEGATRON("test_yarn"),
            ),
            "torchtitan": run(
                "yes, whenever it is configured with a factor above 1 (common/rope.py), since "
                "2026-08-11 (torchtitan#4117); before, as DeepSeek with the training length",
                test=WHOLE,
            ),
            "SGLang": read("yes"),
        },
        RECORD("yarn_when"),
        "beyond_original",
        "the logits of a short prompt with `max_position_embeddings` 4096 and 8192: equal "
        "(always, or never), or not.",
        ((f"{MAIN}, max_positions = original", ex.yarn_when),),
        words="RoPE rotary frequencies context",
    ),
    Trap(
        "YaRN's mscale",
        "What does YaRN's temperature multiply, and by which constant?",
        {
            "DeepSeek": read(
                "the softmax scale, by (0.1 m ln 40 + 1)²; m is 1.0 for V3 and the 236B "
                "config, 0.707 for the 16B"
            ),
            "paper": read(
                "YaRN on the rotated key alone; all code rotates queries too. V2: √t = "
                "0.0707 ln 40 + 1"
            ),
            "HF": run(
                "as DeepSeek, m = `mscale_all_dim`; deepseek_v2 ignored it before "
                "transformers#47435. Cos and sin are multiplied by m(mscale) / "
                "m(mscale_all_dim), or by m(1) if one of them is 0. V2's config.json has "
                "0.707 for all sizes (llama.cpp#7118)",
                test=DRAWN,
            ),
            "DeepSeek-V2.5": told(
                "1.0, it is said. Its config.json was looked for and not found in DeepSeek's "
                "repositories on GitHub, in copies there and on pages about it; Hugging Face could "
                "not be reached. llama.cpp logs 0.1 m as `yarn_log_multiplier` when it loads "
                "a file: ollama#7072 is such a log, of which that line was not at hand"
            ),
            "Megatron": run(
                "m = `mscale_all_dim`, 0 by default, and cos and sin by the ratio of the "
                "two mscales, 1.369 by default: the rotated part of a score is 1.874 "
                "times larger, the rest is not (multi_latent_attention.py)",
                test=MEGATRON("test_yarn"),
            ),
            "torchtitan": run(
                "as DeepSeek; its 16B has 0.70, not 0.707", test=TITAN("test_mscale_of_its_16b")
            ),
        },
        "`Yarn.mscale`, `Yarn.mscale_all_dim`, " + RECORD("yarn_factor"),
        "1.0, 1.0, ratio",
        "logits agree at position 0 alone, where the softmax has one entry: test later positions.",
        (
            ("softmax scale at 192 wide heads", ex.mscale),
            (MAIN, ex.mscale_default),
            (f"{MAIN}, mscale 0.5, mscale_all_dim 0", ex.yarn_factor),
        ),
        words="RoPE rotary softmax scale temperature",
    ),
    Trap(
        "The balance loss's counts",
        "What does f_i of the sequence-wise balance loss count?",
        {
            "paper": read("the K best unbiased scores, without groups (V3 eq. 18); α = 1e-4"),
            "DeepSeek": read(
                "the modelling file beside the weights counts the routed experts, and "
                "does not normalise the scores. One config of V3-0324 is said to have α = "
                "0.001, others nothing, which reads as 0",
                at=BESIDE,
            ),
            "HF": run("none for these models", test=DRAWN),
            "Megatron": run(
                "as the paper (`compute_routing_scores_for_aux_loss`), with 1e-20 added to the sum "
                "of the scores; α = 0 and a batch-wise loss by default. Of padded sequences each "
                "is divided by the square of the batch's *mean* length "
                "(`get_tokens_per_expert_and_token_count`): with lengths 11, 7 and 4 they count "
                "2.25, 0.91 and 0.30 times as much as their own lengths say",
                test=MEGATRON("test_balance_loss"),
            ),
            "torchtitan": run("no balance loss, the bias alone", test=WHOLE),
            "TileKernels": read(
                "the ids that it is given; −1 is left out of the counts and not of the "
                "divisor (aux_fi_kernel.py)"
            ),
        },
        RECORD("balance_counts"),
        "unbiased",
        "give one expert a large bias: under `unbiased` the loss does not change.",
        (
            ("sum of the balance losses", ex.balance_counts),
            ("mean of three sequences of 11, 7 and 4 tokens", ex.padded_balance),
        ),
        words="padding padded aux_loss auxiliary",
    ),
    Trap(
        "The bias's update",
        "Is the mean subtracted from the change of the gate's biases?",
        {
            "DeepSeek": read("no code"),
            "paper": read(
                "no: b_i += γ sign(mean load − load_i) (V3 2.1.2), γ 0.001 for 14.3T tokens, then 0"
            ),
            "HF": read("never updated: a buffer; an export that zeroes it loses the routing"),
            "Megatron": run(
                "no; once an optimiser step (`get_updated_expert_bias`); counts where "
                "gradients are recorded, so re-entrant recomputation counts once",
                test=MEGATRON("test_bias_update"),
            ),
            "torchtitan": run(
                "yes (`_update_expert_bias`); counts recomputed forwards, and halves the loads "
                "then; evaluation batches leaked in (torchtitan#4148)",
                test=TITAN("test_recomputed_forwards_count"),
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
            "DeepSeek": read(
                "the model's type, bfloat16, scores too (the bias is float32 since "
                "2025-08-26); V3.2-Exp (3b99a53): float32. V3's adds nothing"
            ),
            "HF": run("float32; adds 1e-20 (`DeepseekV3TopkRouter`)", test=DRAWN),
            "Megatron": run(
                "the input's type unless `moe_router_dtype` is set, scores float32; adds "
                "1e-20 unless top-k is 1 (moe_utils.py)",
                test=MEGATRON("test_the_gate"),
            ),
            "torchtitan": read(
                "float32 by autocast, which leaves float64 as it is, and which a CPU lacks: the "
                "model's type there, as everywhere before 2026-04-02; adds 1e-20 (common/moe.py)"
            ),
            "SGLang": read(
                "its kernel without groups adds 1e-20 (grouped_topk.cuh), its fused gate with "
                "groups and its PyTorch code nothing (moe_fused_gate.cuh, moe/topk.py)",
                at="SGLang 517d0ca, 0470ac6, 000328a",
            ),
            "TileKernels": read("float32; its sum starts at 1e-20 (top2_sum_gate_kernel.py)"),
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
            "DeepSeek": read(
                "a bias only if the width is 7168, so a shrunken config silently loses "
                "it; groups by their two best with a bias, by the best without (`Gate`, "
                "inference/model.py)"
            ),
            "paper": read("the sum of a group's best K / kept groups"),
            "HF": run(
                "V3: always a bias, two best. V2: none, the best, and norm_topk_prob does "
                "nothing (the file beside V2's weights: normalised, then not scaled); no "
                "released V2 sets it",
                test=DRAWN,
            ),
            "Megatron": run(
                "the best K // kept groups, bias or not; a sigmoid gate of top-k 1 is not "
                "normalised",
                test=MEGATRON("test_the_gate"),
            ),
            "torchtitan": run(
                "the two best, bias or not", test=TITAN("test_groups_without_a_bias")
            ),
            "TileKernels": read("the two best"),
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
            "DeepSeek": told(
                "the file beside the V3 weights asserts that it is not training; with "
                "that line patched out only the shared expert runs (LLaMA-Factory#6829; "
                "the same assert is in DeepSeek-VL2's file)"
            ),
            "HF": run("native code runs both", test=DRAWN),
            "Megatron": read("both"),
            "torchtitan": run("both", test=WHOLE),
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
            "DeepSeek": read(
                "`weight_scale_inv` multiplies, in spite of its name (`weight_dequant`)"
            ),
            "paper": read("an online amax per tile, 1 × 128 and 128 × 128 (V3 3.3)"),
            "HF": read("multiplies"),
            "vLLM": told("multiplies"),
            "SGLang": read("multiplies"),
        },
        "fixed: multiplies",
        "–",
        "weights of magnitude 1e-2 against 1e6.",
        (("largest weight of a tile, 0.05 before", ex.weight_scale_inv),),
        checkpoint=True,
    ),
    Trap(
        "Active parameters",
        'What do the "37B active" count?',
        {
            "DeepSeek": read(
                "README_WEIGHTS: 36.7B with embedding and head, 0.9B each, which is neither sum"
            ),
            "paper": read("37B"),
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
            "paper": read(
                "DeepSeekMath: tokens, mean over each output, then over outputs. V3 and "
                "R1 print a ratio of whole outputs and no 1/|o|; nobody below computes that"
            ),
            "TRL": run(
                "`loss_type` dapo (all tokens alike), β 0; ratio of tokens, or the |o|-th "
                "root of the output's (GSPO); vespo weights its log-probabilities by a function of "
                "the product over the output. `delta` bounds ρ whatever A's sign: it is our "
                "`dual_clip` for δ ≥ 1 + ε_high alone (`_compute_loss`)",
                test=TRL("test_loss_types"),
            ),
            "verl": run(
                "mean over all tokens, dual clip at 3, no KL loss unless asked; others by "
                "`loss_agg_mode` (core_algos.py). Log-ratios stop at ±20",
                test=VERL("test_loss_modes"),
            ),
            "torchtitan": run(
                "its GRPO is DAPO with a symmetric clip, no KL; log-ratios stop at ±10, and tokens "
                "whose sampler's log-probability is not finite are dropped "
                "(experiments/rl/losses): give them `mask=False`",
                test=TITAN("test_grpo"),
            ),
            "OpenRLHF": read("mean over all tokens, no dual clip (`PolicyLoss`)"),
        },
        "`grpo_forward(ratio=, average=)`, `GRPO_PRESETS`",
        "token, sequence",
        "outputs of 1 and 9 tokens with opposite advantages, on-policy: 0 if outputs weigh "
        "alike, not if tokens do.",
        (
            ("loss of four outputs", ex.grpo_level),
            ("ratio of an output whose four tokens have ρ = e^0.1", ex.vespo_weight),
            ("loss of a token with A = −1 and ln ρ = 12", ex.log_ratio_bound),
            ("loss of a token with A = 1 and ρ = 1.15", ex.delta),
        ),
        words="GRPO DAPO GSPO vespo delta dual_clip loss_type ratio",
    ),
    Trap(
        "The advantage's deviation",
        "Divided by G or G − 1, plus which ε, and what does a group of one get?",
        {
            "paper": read('"std", nothing more'),
            "TRL": read("G − 1, ε 1e-4; a group of one gets 0 (`nanstd`)"),
            "verl": run(
                "G − 1, ε 1e-6; a group of one gets its reward: mean 0, deviation 1 "
                "(`compute_grpo_outcome_advantage`)",
                test=VERL("test_advantages"),
            ),
            "torchtitan": read("no deviation by default; if asked, G, ε 1e-6"),
            "OpenRLHF": read("G − 1, ε 1e-9; refuses a group of one (train_ppo_ray.py)"),
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
            "paper": read(
                "DeepSeekMath: r − ln r − 1, unclamped; its mean gradient is that of "
                "KL(π_ref‖π), not of KL(π‖π_ref). V3.2 multiplies it by the ratio, and it "
                "is"
            ),
            "TRL": run(
                "unclamped, so it can be infinite (trl#3015, trl#6637); times the ratio by "
                "default in 1.16 (`use_bias_correction_kl`, trl#6503). Without that its gradient "
                "is not the KL's (trl#4967)",
                test=TRL("test_kl"),
            ),
            "verl": run(
                "clamps the log-ratio to ±20 and k3 to 10: beyond ln r ≈ 2.6 no gradient "
                "is left (`kl_penalty_forward`)",
                test=VERL("test_kl"),
            ),
            "OpenRLHF": read(
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
            "paper": told(
                "R1's first stage is reported to have ε = 10; 1 − ε is negative, so only "
                "A > 0 with a ratio above 11 is clipped"
            ),
            "TRL": run("0.2", test=TRL("test_loss_types")),
            "verl": run("0.2, and ratios above 3 where A < 0", test=VERL("test_loss_modes")),
            "torchtitan": run("0.2", test=TITAN("test_grpo")),
            "OpenRLHF": read("0.2"),
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
            "DeepSeek": read(
                "rotated part and norms always; compressed queries in V2 and V3, not in V2-Lite"
            ),
            "paper": read(
                "rotated part and compressed queries (V2 eq. 9–19), at inference too; norms: see 6"
            ),
            "HF": run("as DeepSeek", test=DRAWN),
            "Megatron": read("as DeepSeek"),
            "torchtitan": run("as DeepSeek", test=WHOLE),
            "teaching code": read(
                "rasbt/LLMs-from-scratch (ch04/05_mla) has no RoPE, no norm of the latent "
                "and whole queries, and says that queries are compressed in training alone"
            ),
        },
        "`ModelConfig.q_latent`; the others fixed",
        "as the config says",
        "without the rotated part attention does not know the order of the tokens before it.",
        ((MAIN, ex.rotation),),
        words="RoPE rotary latent",
    ),
    Trap(
        "The latent norms' eps",
        "Do the two latent norms take the config's `rms_norm_eps`?",
        {
            "DeepSeek": read(
                "its inference code has 1e-6 for every norm; the file beside the weights as HF"
            ),
            "HF": run("no: their class's default of 1e-6 (`DeepseekV2Attention`)", test=DRAWN),
            "Megatron": read("yes"),
            "torchtitan": run("no: 1e-5 for every norm, whatever the checkpoint says", test=WHOLE),
            "SGLang": read("yes"),
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
            "DeepSeek": read("its rotation and its softmax are float32 (inference/model.py)"),
            "HF": run(
                "no: norms, gate, softmax, rotation and loss cast to float32 inside. At late "
                "positions float32 angles move logits by 1.2e-4 (position 32,000) and 7.9e-4 "
                "(163,000)",
                test=ORACLE("test_float64_is_not"),
            ),
            "Megatron": run(
                "the gate's scores, YaRN's angles (2e-7 of them) and the vocabulary-parallel "
                "loss (7e-8) are float32",
                test=MEGATRON("test_vocabulary_parallel_loss"),
            ),
            "torchtitan": run(
                "the gate stays float64 (common/moe.py); the routed experts are cast to bfloat16, "
                "rotation and loss to float32: logits are off by 5e-3, gradients by 1e-2",
                test=TITAN("test_float64_is_not"),
            ),
        },
        "fixed: float64 stays float64",
        "–",
        "a difference of 1e-7 that does not shrink from float32 to float64.",
        (
            ("largest relative change of a logit, norms and gate", ex.hidden_float32),
            ("largest error of a cosine by float32 angles, V3", ex.late_angles),
        ),
        words="bfloat16 precision autocast angles RoPE",
    ),
    Trap(
        "MTP's tail",
        "Does MTP module k run over the T − k positions that have a token to read, or over all T?",
        {
            "paper": read("1 … T − k (V3 eq. 21–24)"),
            "HF": read("drafts alone, over what it is given (`MtpModel`)"),
            "Megatron": run(
                "T: it rolls the tokens, and the last k positions read token 0 "
                "(`roll_tensor`, `_get_embeddings`). The tail has no loss, but it counts in "
                "balance loss and loads: with its balance loss 79 of 87 gradients differ, by 4e-2. "
                "Its modules' gates have their biases moved (`_update_router_expert_bias`)"
            ),
            "torchtitan": run(
                "T, the tail reads token 0 with its state zeroed (`roll_mtp_sequence`). The hook "
                "that moves the gates' biases walks `layers` and leaves the MTP modules' gates as "
                "they are (components/optimizer)",
                test=TITAN("test_the_bias_update"),
            ),
        },
        "fixed: T − k; `model.mtp_module_forward` on a batch of T positions gives the other. "
        "`bias_update` moves the gates that it is called for",
        "T − k",
        "the losses agree and the gradients of the MTP module's gate do not; loads add up to K T "
        "or K (T − k) per sequence.",
        (("balance loss of MTP module 1", ex.mtp_tail),),
        words="roll shift positions bias",
    ),
    Trap(
        "What MTP's gradient reaches",
        "Does the MTP losses' gradient go into the main model, the shared tensors, the depth "
        "before?",
        {
            "paper": read("everything: nothing is said to be detached"),
            "Megatron": read(
                "everything; with `mtp_detach_heads` the main model's state, the embedding and the "
                "head's weight are constants, and the chain between depths is not "
                "(`process_mtp_loss`, `_get_embeddings`)"
            ),
            "torchtitan": run("everything (`MTPDecoder.forward`)", test=WHOLE),
            "HF": run("everything, if a loss is put on top (`MtpModel`)", test=TRAINING),
            "verl": read(
                "as Megatron, but with an older one not the head's weight; with `detach_encoder` "
                "not the embedding nor the main model's state (models/mcore/mtp_patch.py)"
            ),
        },
        "fixed: everything. *heads*: the gradients of `mtp_depth=0` for the main model's tensors, "
        "ours for the modules'. *trunk* (the state that module 1 reads) and *every depth* (those "
        "that all read): `ops=` with an `mtp` whose backward gives 0 for the state",
        "nothing is detached",
        "losses agree to the last bit, gradients do not: the final norm's moves under all three, "
        "the head's under heads, that of module 1's own norm under every depth.",
        (
            ("largest gradient of the final norm", ex.mtp_detach_norm),
            ("of the head", ex.mtp_detach_head),
            ("of MTP module 1's own norm", ex.mtp_detach_module),
        ),
        words="mtp_detach detach heads trunk encoder",
    ),
    Trap(
        "Outputs with all tokens masked",
        "Does an output without a token that counts count in the mean over outputs?",
        {
            "paper": read("does not say: an output has a token"),
            "TRL": run(
                "yes: 0 in the numerator, 1 in the denominator", test=TRL("test_empty_outputs")
            ),
            "verl": run(
                "no (`agg_loss`: seq-mean-*), unless the caller gives `global_batch_size`, as its "
                "own engines do",
                test=VERL("test_empty_outputs"),
            ),
            "OpenRLHF": read("no (`aggregate_loss`)"),
            "torchtitan": run("has the mean over tokens alone", test=TITAN("test_grpo")),
        },
        "`grpo_forward(empty=)`",
        "counted",
        "mask all tokens of one of N outputs: the loss shrinks by (N − 1)/N if the others' part "
        "stays, and does not if N is now N − 1.",
        (("loss of four outputs, one empty", ex.empty_outputs),),
        words="GRPO truncated overlong mask N",
    ),
    Trap(
        "Left padding",
        "Is the first real token of a left-padded row a target, predicted from padding?",
        {
            "HF": run(
                "yes, if its label is not −100: labels of −100 at padding leave it in "
                "(`ForCausalLMLoss`). It is predicted from padding, whose attention sees no key: "
                "`eager` gives the mean of all values (`blind_query` mean), `sdpa` 0 (zero)",
                test=ORACLE("test_left_padding_counts_the_first_token"),
            ),
            "DeepSeek": read("pads on the right (inference/generate.py)"),
            "TRL": read("GRPO: the loss is of the completion alone, which is padded on the right"),
        },
        f"{RECORD('target_after_padding')} and {RECORD('blind_query')}",
        "False, zero",
        "put −100 on the label of each row's first real token too: the losses agree then.",
        (("mean loss, one row with six padding tokens on the left", ex.left_padding),),
        words="padding attention_mask labels −100 batch",
    ),
    Trap(
        "RoPE's layout",
        "Do a head's rotated pairs lie next to each other in the weights, or in two halves?",
        {
            "DeepSeek": read("next to each other: 0 with 1, 2 with 3 (`apply_rotary_emb`)"),
            "HF": run(
                "as DeepSeek in the weights; it permutes q and k to halves before it rotates, so "
                "its q and k differ in order and its scores do not (`rope_interleave`)",
                test=DRAWN,
            ),
            "Megatron": run(
                "as DeepSeek for MLA (`mla_rotary_interleaved`, multi_latent_attention.py)",
                test=MEGATRON("test_rope_layout"),
            ),
            "torchtitan": run("as DeepSeek (`ComplexRoPE`)", test=WHOLE),
        },
        RECORD("rope_layout"),
        "interleaved",
        "right at position 0, wrong from the second token on; with all tokens alike still wrong. "
        "Permute the rows of one head's rotated part, even ones first, and compare again.",
        ((MAIN, ex.rope_layout),),
        words="rotary rotate_half interleave pairs halves convert",
    ),
    Trap(
        "The bias in the weights",
        "Are the chosen experts weighted by their scores, or by the scores with the bias?",
        {
            "DeepSeek": read("scores: `original_scores` (`Gate`, inference/model.py)"),
            "paper": read("scores: the bias is used for routing alone (V3 eq. 16)"),
            "HF": run("scores; biased ones before transformers#41647", test=DRAWN),
            "Megatron": run(
                "scores (`topk_routing_with_score_function`)", test=MEGATRON("test_the_gate")
            ),
            "torchtitan": run("scores (common/moe.py)", test=WHOLE),
            "TileKernels": read("scores (top2_sum_gate_kernel.py)"),
            "SGLang": read("scores (moe/topk.py)", at="SGLang 000328a"),
            "vLLM": told("scores; biased ones before vllm#12002"),
        },
        "fixed: scores",
        "scores",
        "add one constant to all biases: routes and weights do not change, if they are the "
        "scores'.",
        ((MAIN, ex.biased_weights),),
        words="e_score_correction_bias router gate experts",
    ),
    Trap(
        "What a softmax gate ranks",
        "Are experts and groups of a softmax gate chosen by scores or by logits?",
        {
            "DeepSeek": read("scores (`Gate`, inference/model.py)"),
            "paper": read("scores (V2 section 2.1.2)"),
            "HF": run("scores (`DeepseekV2Moe`)", test=DRAWN),
            "Megatron": run(
                "logits, unless `moe_router_pre_softmax`: a group's score is a sum of logits, and "
                "the softmax is over the chosen (`topk_routing_with_score_function`)",
                test=MEGATRON("test_what_a_softmax_gate_ranks"),
            ),
            "torchtitan": run("scores (common/moe.py)", test=TITAN("test_groups_without_a_bias")),
            "TileKernels": read("logits, the bias added to them (top2_sum_gate_kernel.py)"),
        },
        RECORD("softmax_ranking"),
        "scores",
        "without groups and bias nothing changes; with groups a token whose best group has one "
        "large and one tiny score goes elsewhere.",
        (("main loss, steep softmax gate with groups", ex.softmax_ranking),),
        words="router groups pre_softmax",
    ),
    Trap(
        "The main loss in parts",
        "A batch comes in micro-batches and on ranks. What is the sum of its losses divided by?",
        {
            "HF": run(
                "the targets of all micro-batches and ranks (`Trainer._get_num_items_in_batch`), "
                "if the model's `forward` takes loss arguments, as these do; else the mean of the "
                "micro-batches' means (`training_step`)",
                test=SPLITS("test_micro_batches_by_num_items_in_batch"),
            ),
            "Megatron": run(
                "each micro-batch by its own, then the mean over micro-batches and ranks; with "
                "`calculate_per_token_loss`, off by default, the whole batch's "
                "(`forward_step_calc_loss`, `finalize_model_grads`)",
                test=MEGATRON("test_micro_batches"),
            ),
            "torchtitan": run(
                "the targets of all micro-batches and data ranks, counted before the first forward "
                "(`Trainer.train_step`); means of means before torchtitan#2206",
                test=TITAN("test_micro_batches"),
            ),
            "TRL": read("as HF's Trainer (`SFTTrainer.compute_loss`)"),
            "verl": read(
                "the tokens of all micro-batches and data ranks (`forward_backward_batch`, "
                "`sft_loss`)"
            ),
            "OpenRLHF": run(
                "the tokens of the step's micro-batches and ranks (`iter_grad_accum_global_norm`)"
            ),
        },
        IN_PARTS,
        "the whole batch's count",
        "two micro-batches of one row each, one with 1 target and one with many, against both rows "
        "in one. With equally many targets nothing shows.",
        (("main loss, rows of 20 and 3 tokens", ex.main_in_parts),),
        words=SPLIT_WORDS + " SFT num_items_in_batch calculate_per_token_loss padding",
    ),
    Trap(
        "MTP's count in parts",
        "The same for MTP, whose modules have fewer targets than the main loss.",
        {
            "Megatron": run(
                "each micro-batch by the module's own, then the mean over micro-batches and ranks; "
                "with `calculate_per_token_loss` each micro-batch's mean is weighted by its main "
                "loss's count (`process_mtp_loss`), for which Megatron-LM#7452 has an example: "
                "14/3 where 4 is right. Before Megatron-LM#3159 it was the main loss's count of "
                "the whole (#2417)",
                test=MEGATRON("test_micro_batches"),
            ),
            "torchtitan": run(
                "the main loss's targets of all micro-batches and data ranks, as in one batch "
                "(`MTPLoss`)",
                test=TITAN("test_micro_batches"),
            ),
            "HF": run(
                "has no such loss: with labels it raises TypeError",
                test=ORACLE("test_labels_of_mtp_raise"),
            ),
        },
        IN_PARTS + "; which count: " + RECORD("mtp_normaliser"),
        "the whole batch's count, positions",
        "one micro-batch with a row of two tokens: it has a main target and none of module 1.",
        (("MTP module 1's part of the loss, its own targets, the same rows", ex.mtp_in_parts),),
        words=SPLIT_WORDS + " normaliser calculate_per_token_loss padding",
    ),
    Trap(
        "The balance loss in parts",
        "Which tokens are f and P counted over, and what is the loss of several micro-batches?",
        {
            "paper": read("of each sequence (V3 eq. 17–20)"),
            "Megatron": run(
                "`seq_aux_loss`: of each sequence; the mean over a micro-batch's, then over "
                "micro-batches. With `calculate_per_token_loss` each mean is weighted by the "
                "tokens of its micro-batch and divided by the targets of all: a masked prompt "
                "makes it larger. `aux_loss`, the default: of the micro-batch. `global_aux_loss`: "
                "f of the micro-batches so far, each taken to be as long as this one "
                "(Megatron-LM#7213), and divided by the ranks once more (#3672)",
                test=MEGATRON("test_balance_loss_of_micro_batches"),
            ),
            "HF": run(
                "none for these models; Mixtral's is of the micro-batch, and each is added in "
                "full: × micro-batches",
                test=SPLITS("test_mixtral_s_balance_loss"),
            ),
            "torchtitan": run("no balance loss", test=WHOLE),
            "TRL": read(
                "the model's own, of the micro-batch, divided by their number (`SFTTrainer`, "
                "`GRPOTrainer`)"
            ),
            "OpenRLHF": read("the model's own, of the micro-batch; DeepSpeed takes the mean"),
            "Automodel": told("× micro-batches before Automodel#3359"),
        },
        IN_PARTS + "; `exchanging` counts where sequences are cut",
        "each sequence's counts, the mean over all sequences",
        "two sequences that send all tokens to one expert each, to another one: balanced if f is "
        "counted over both.",
        (
            ("sum of the balance losses, the same rows", ex.balance_in_parts),
            ("the same of two full rows in one micro-batch", ex.statistics_of_part),
        ),
        words=SPLIT_WORDS + " aux_loss auxiliary seq_aux_loss global_aux_loss load balancing",
    ),
    Trap(
        "GRPO's average in parts",
        "Which tokens or outputs does a mean over them count, if outputs come in micro-batches?",
        {
            "TRL": run(
                "dapo, cispo, vespo: the tokens of all micro-batches and ranks (trl#5619); where a "
                "generation lasts for several steps, the mean step's (trl#6024). grpo: the mean "
                "over micro-batches, which have equally many outputs. bnpo: the mean of token "
                "means",
                test=TRL("test_micro_batches"),
            ),
            "verl": run(
                "what its engines count over micro-batches and ranks: tokens, or the mini-batch's "
                "outputs, empty ones too (`global_batch_info`). A caller without counts gets the "
                "micro-batch's own, and the sum of the means (verl#7321)",
                test=VERL("test_micro_batches"),
            ),
            "torchtitan": read(
                "the tokens of all micro-batches that have the sampler's log-probability "
                "(experiments/rl, `Batcher`)"
            ),
            "OpenRLHF": run(
                "the tokens, or the outputs that have any, of the step's micro-batches and ranks "
                "(`iter_grad_accum_global_norm`)"
            ),
            "ms-swift": told(
                "dapo: the tokens of all micro-batches, then their number too, before "
                "ms-swift#10116 (#10117)"
            ),
        },
        "`grpo_forward(normaliser=)`; a split of `refimpl grads` names what others make of it",
        "the whole batch's count",
        "outputs of unequal length, in one micro-batch and in several.",
        (
            ("mean over the tokens of four outputs, two and two", ex.token_mean_in_parts),
            ("mean over four outputs, one and three", ex.output_mean_in_parts),
        ),
        words=SPLIT_WORDS + " dapo bnpo loss_agg_mode",
    ),
    Trap(
        "FP8's floor",
        "How small may the largest number of a tile be before its scale stops to follow it?",
        {
            "DeepSeek": read(
                "`act_quant` had no floor before 2025-08-28, so a tile of zeros was 0/0 "
                "(inference/kernel.py)"
            ),
            "paper": read("does not say"),
            "DeepGEMM": read("1e-4, in the casts beside its kernels (utils/math.py)"),
            "TileKernels": read("1e-4, unless the caller gives another (quant/common.py)"),
            "TransformerEngine": read(
                "none by default (`amax_epsilon`); a tile of zeros has the scale 1 "
                "(recipe_common.cuh)"
            ),
            "torchao": read("1e-12 (blockwise_fp8_training/kernels.py)"),
        },
        RECIPE("floor"),
        "0.0001",
        "give a linear map gradients of 1e-11: with a floor of 1e-4 they come out as 0. Those of a "
        "mean over many tokens can be that small.",
        (
            ("a number of a tile of zeros, quantised", ex.fp8_floor),
            ("relative error of a tile of gradients of 1e-11", ex.fp8_small_gradient),
        ),
        words=FP8_WORDS + " amax epsilon clamp zeros",
    ),
    Trap(
        "FP8's form of scale",
        "Is a tile's scale any float32 number or a power of two, and is that one rounded up?",
        {
            "paper": read(
                "powers of two for the input of attention's output and for what the experts are "
                "sent; else it does not say (V3 3.3)"
            ),
            "DeepSeek": told("V3.1 was trained with UE8M0 for weights and activations (its card)"),
            "DeepGEMM": read(
                "float32 on SM90, UE8M0 on SM100 (README.md); rounded up (`ceil_to_ue8m0`)"
            ),
            "TileKernels": read("either (`round_sf`), rounded up (quant/common.py)"),
            "TransformerEngine": read(
                "a power of two, rounded up; float32 if NVTE_FP8_BLOCK_SCALING_FP32_SCALES is 1 "
                "(`Float8BlockScaling`, recipe_common.cuh). MXFP8 rounds up too (`float_to_e8m0`)"
            ),
            "torchao": read(
                "float32, one over a rounded 448/amax (blockwise_fp8_training/kernels.py); "
                "its MX formats by default 2^(⌊log₂ amax⌋ − 8), as OCP recommends, which cuts off "
                "what lies above 448 (`ScaleCalculationMode`, mx_formats/config.py, fc0fcd2)"
            ),
            "torchtitan": read(
                "has no tiles: one scale per row (quantization/float8.py); tiles were proposed in "
                "torchtitan#3891"
            ),
        },
        RECIPE("scale"),
        "float32",
        "the scales' last 23 bits: 0 if they are powers of two. Rounded down, the largest number "
        "of a tile comes back smaller by up to a half.",
        (
            ("a tile's largest number, 1.9 before", ex.fp8_largest),
            ("relative error of normal numbers, tiles of 128", ex.fp8_scale_error),
        ),
        words=FP8_WORDS + " ue8m0 e8m0 power of two MXFP8 rounding",
    ),
    Trap(
        "FP8's sums",
        "How long does a tensor core add before float32 goes on?",
        {
            "paper": read(
                "128 terms; without that Hopper's 14 bits err by near 2 % at 4,096 terms (V3 3.3)"
            ),
            "DeepSeek": read("128 terms, a `tl.dot` each (`fp8_gemm_kernel`, inference/kernel.py)"),
            "DeepGEMM": read(
                "128 terms, then scaled and added in float32 (sm90_fp8_gemm_1d2d.cuh)"
            ),
            "TransformerEngine": read(
                "cuBLAS's split accumulator, which `Float8BlockScaling` requires for all products"
            ),
            "torchao": read("128 terms, a `tl.dot` each (blockwise_fp8_training/kernels.py)"),
        },
        "`Recipe.bits`, " + RECIPE("promote"),
        "0, 128",
        "a product of 127 ones and one 2⁻⁸: exact in float32, 127 with 14 bits.",
        (("largest error of a product of 4,096 positive terms, %", ex.fp8_sums),),
        words=FP8_WORDS + " accumulation promotion split accumulator fast_accum 14 bits",
    ),
    Trap(
        "FP8's input of the weight's gradient",
        "From what is an activation quantised along the tokens, for the weight's gradient?",
        {
            "paper": read(
                "from its FP8 numbers: read, transposed, quantised again as 128 × 1 (V3 3.3, 3.5)"
            ),
            "TileKernels": read(
                "either: `per_channel_cast_fused` takes FP8 with its scales, too "
                "(quant/per_channel_cast_fused_kernel.py)"
            ),
            "TransformerEngine": read(
                "from the high-precision input, to quantise once (`Float8BlockScaling`)"
            ),
            "torchao": read(
                "from the bfloat16 input, which it keeps (`fp8_blockwise_mm`, linear.py)",
                at="torchao 36c8798",
            ),
        },
        RECIPE("weight_input"),
        "kept",
        "outputs and gradients of inputs agree, those of weights differ by 2 or 3 %. With scales "
        "that are powers of two the difference nearly vanishes.",
        (("relative error of a weight's gradient, 256 tokens", ex.fp8_weight_input),),
        words=FP8_WORDS + " wgrad re-tiling requantise transpose double quantisation",
    ),
)
