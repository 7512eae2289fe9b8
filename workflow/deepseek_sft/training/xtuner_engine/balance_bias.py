"""Moves the routers' balance biases after every step, where the run does so (``train.balance_bias_speed``)."""

from typing import Any

from mmengine.hooks import Hook

from .loop import StepResult


class BalanceBiasHook(Hook):
    """Comes before the checkpoint of the step: the biases are part of it."""

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: StepResult | None = None
    ) -> None:
        balance_bias = runner.model.model.module.balance_bias
        if outputs.verdict.apply:
            balance_bias.apply()
        else:  # the step counts for nothing
            balance_bias.load = []
