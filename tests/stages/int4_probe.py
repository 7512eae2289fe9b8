"""Run by the environment serve-cpu: INT4 matrices dequantised by compressed-tensors, and by us; prints JSON."""

import json

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize

from deepseek_sft.tensors import int4_groups

torch.manual_seed(0)
found = {}
for shape in ((7, 32), (64, 64), (512, 7168)):
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    groups = (shape[0], shape[1] // int4_groups.GROUP)
    scales = (torch.rand(groups) * 10 ** torch.empty(groups).uniform_(-4, 2)).bfloat16()
    packed = pack_to_int32(codes, 4)
    library = dequantize(x_q=unpack_from_int32(packed, 4, torch.Size(shape)), scale=scales).float().numpy()
    ours = int4_groups.dequantize(packed.numpy().view(np.uint32), scales.view(torch.uint16).numpy())
    found[str(shape)] = int((library.view(np.uint32) != ours.view(np.uint32)).sum())
print(json.dumps(found))
