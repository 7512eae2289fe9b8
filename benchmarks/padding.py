"""One step of rows of log-normal lengths in lockstep: in the order of the data, dealt by cost, packed."""

from typing import Any

import numpy as np

MEAN, SPREAD, LONGEST = 244, 0.8, 1024  # of the rows' lengths: a 32nd of the published 7,800 and 32,768
GROUPS = 64  # data-parallel ones of the published run
PACKED_BAR = 1 / 3


def padding(bench: Any) -> None:
    """Tokens per second of rows of log-normal lengths: in the order of the data, dealt by cost, packed.

    The published step at a thirty-second of its lengths: 64 data-parallel groups, micro batches of 2, 16 of them for
    each group. As it was before rows were dealt or packed: in the order of the data, each micro batch padded to its
    longest row, all groups waiting for the longest of the turn. Two ranks compute what all wait for.
    """
    from deepseek_sft.data import dealing
    from deepseek_sft.data.packing import best_fit

    shape = {"micro_batch_size": 2, "gradient_accumulation_steps": 16}
    drawn = np.random.default_rng(0).lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, 4096)
    lengths = np.clip(drawn, 16, LONGEST).astype(np.int32)
    loose = bench.rows_of("loose", [[int(length)] for length in lengths])
    rows = best_fit(lengths, LONGEST)
    packed = bench.rows_of("packed", [[int(lengths[number]) for number in row] for row in rows])
    fewer = dealing.accumulation_for(shape["gradient_accumulation_steps"], len(lengths) / len(rows))
    case = {"kind": "lockstep", "groups": GROUPS, "tokens": loose, "settings": shape}
    found = bench.run(
        {
            "in order": case | {"settings": shape | {"deal_rows": "order"}},
            "dealt": case,
            "packed": case | {"tokens": packed, "settings": shape | {"gradient_accumulation_steps": fewer}},
        }
    )
    each = f"{len(lengths) / len(rows):.1f} samples a row"
    print(
        f"timed: one step of {GROUPS} groups, 2 ranks × 1 thread computing the two longest micro batches of each "
        f"turn; samples of {lengths.mean():.0f} tokens on average, up to {LONGEST}, micro batches of 2, "
        f"{shape['gradient_accumulation_steps']} of them a step, {fewer} packed ({each})"
    )
    rates = {name: figures["tokens"] / figures["seconds"] / GROUPS for name, figures in found.items()}
    # Of the rank with the longest micro batches, which waits for nobody: what else the machine does counts less.
    computed = {name: figures["tokens"] / figures["processor seconds"] / GROUPS for name, figures in found.items()}
    for name, rate in rates.items():
        figures = found[name]
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in figures["phases"].items())
        print(
            f"  {name}: {rate:.1f} tokens/s a group, {rate / rates['in order']:.2f} ×; {figures['useful']:.1%} of "
            f"slots useful; {figures['seconds']:.0f} s ({phases}); {computed[name]:.1f} tokens/s of rank 0's processor"
        )
    bench.bar("in order / packed, by tokens per second", rates["in order"] / rates["packed"], PACKED_BAR)
    bench.bar("the same of rank 0's processor", computed["in order"] / computed["packed"], PACKED_BAR)
    bench.bar("slots that are not useful, dealt", 1 - found["dealt"]["useful"], 0.15)
    bench.bar("slots that are not useful, packed", 1 - found["packed"]["useful"], 0.05)
