"""Moves the routers' balance biases after every step, where the run does so (``train.balance_bias_speed``)."""

from typing import Any

from mmengine.hooks import Hook


class BalanceBiasHook(Hook):
    """Comes before the checkpoint of the step: the biases are part of it."""

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        runner.model.model.module.balance_bias.apply()
