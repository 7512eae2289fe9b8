"""Attention's kernel is a pure function of capability, versions, packing and lengths."""

import pytest

from deepseek_sft.model.attention_choice import FLASH, PADDED, UNPADDED, VARLEN, Device, choose

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
SHORT, LONG = [300, 500, 800], [9000, 12000]


@pytest.mark.parametrize(
    ("requested", "capability", "torch", "cudnn", "sizes", "lengths", "kernel"),
    [
        ("auto", None, (2, 13), None, (192, 128), None, PADDED),
        ("auto", None, (2, 13), None, (192, 128), SHORT, PADDED),
        ("auto", HOPPER, (2, 13), 92000, (192, 128), None, UNPADDED),
        ("auto", HOPPER, (2, 13), 92000, (192, 128), SHORT, VARLEN),
        ("auto", HOPPER, (2, 13), 92000, (192, 128), LONG, UNPADDED),
        ("auto", HOPPER, (2, 13), 91002, (192, 128), None, PADDED),
        ("auto", HOPPER, (2, 13), None, (192, 128), LONG, VARLEN),
        ("auto", HOPPER, (2, 9), 92000, (192, 128), SHORT, PADDED),
        ("auto", HOPPER, (2, 13), 92000, (48, 32), None, PADDED),
        ("auto", HOPPER, (2, 13), 92000, (320, 128), SHORT, PADDED),
        ("auto", AMPERE, (2, 13), 92000, (192, 128), None, PADDED),
        ("auto", AMPERE, (2, 13), 92000, (192, 128), LONG, VARLEN),
        ("auto", (7, 0), (2, 13), 92000, (192, 128), SHORT, PADDED),
        ("auto", BLACKWELL, (2, 13), 92000, (192, 128), None, PADDED),
        ("sdpa", HOPPER, (2, 13), 92000, (192, 128), SHORT, UNPADDED),
        ("sdpa", AMPERE, (2, 13), 92000, (192, 128), SHORT, PADDED),
        ("flash", HOPPER, (2, 13), 92000, (192, 128), SHORT, FLASH),
    ],
)
def test_kernel_follows_from_device_versions_and_rows(requested, capability, torch, cudnn, sizes, lengths, kernel):
    device = Device(capability, torch, cudnn)
    assert choose(requested, device, sizes, lengths is not None, lengths or ()) == kernel
