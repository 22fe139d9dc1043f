"""GRPO by hand-derived gradients, on sums that a rule verifies: ``python examples/grpo.py``.

A new model copies solutions, half of them without the tags of the thought. Then it learns from its
own outputs: the format becomes sure at once, right answers take longer (`refimpl grpo`).
"""

import sys

import numpy as np

from refimpl.config import preset
from refimpl.ops import GRPO_PRESETS, group_advantages
from refimpl.optimizer import AdamW, Moments
from refimpl.train.machine import open_machine
from refimpl.train.packing import pack
from refimpl.train.policy import grpo_gradients
from refimpl.train.rewards import score, total
from refimpl.train.rollout import sample_groups
from refimpl.train.sft import tokens_of
from refimpl.train.step import State, apply_gradients, train_step
from refimpl.train.tasks import draw, sloppy
from refimpl.train.vocabulary import make_vocabulary


def main(copied: int = 160, steps: int = 25, questions: int = 16, group: int = 8) -> list[float]:
    """The mean reward of each step, after so many batches of solutions."""
    machine, vocabulary, optimizer = open_machine(), make_vocabulary(), AdamW(weight_decay=0.0)
    config = preset("mini")
    state = State(machine.parameters(config, seed=0, std=0.06), Moments())
    for step in range(copied):
        problems = enumerate(draw("add2", 0, step, 64))
        solved = [(x.prompt, sloppy(x) if i % 2 else x.solution) for i, x in problems]
        batch = pack([tokens_of(vocabulary, *pair) for pair in solved], length=64).arrays()
        rate = 8e-3 * min((step + 1) / 10, 1 - step / copied)
        state, told = train_step(state, batch, config, machine, optimizer, learning_rate=rate)
    print(f"copied {copied} batches: loss {told.main:.3f}")
    params, moments, rewards = state.params, Moments(), []
    for step in range(steps):
        problems = draw("add2", 1, step, questions)
        prompts, answers = zip(*((x.prompt, x.answer) for x in problems), strict=True)
        seed = step * questions * group
        samples = sample_groups(
            params, config, vocabulary, machine, prompts, group=group, max_tokens=32, seed=seed
        )
        outputs = zip(samples.texts, np.repeat(answers, group), samples.ended, strict=True)
        parts = [score(text, answer, ended=ended) for text, answer, ended in outputs]
        reward = np.array([total(x) for x in parts], machine.dtype).reshape(questions, group)
        given = {"key_mask": samples.key_mask, "mask": samples.mask, "ops": machine.ops}
        given |= {"advantages": group_advantages(reward), "settings": GRPO_PRESETS["dapo"]}
        _, grads = grpo_gradients(params, config, samples.tokens, **given)
        moments, _ = apply_gradients(params, grads, moments, optimizer, 3e-4, max_norm=1.0)
        rewards.append(float(reward.mean()))
        right, form = (np.mean([x[name] for x in parts]) for name in ("accuracy", "format"))
        print(f"{step + 1}: reward {rewards[-1]:.2f}, right {right:.2f}, format {form:.2f}")
    return rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
