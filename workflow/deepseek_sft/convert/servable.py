"""A base as servers read it without code of its folder: its weights linked, config.json and tokenizer as a trained
model of it has them. Nothing is copied but small files.
"""

import os
import shutil
from pathlib import Path

from ..errors import BadInputError
from ..tensors.safetensors_files import INDEX_NAME
from .base_model import BaseModel
from .convert import copy_companions
from .output_tensors import output_config


def link(base: BaseModel, folder: Path) -> None:
    """Make ``folder``, which takes its name last.

    Args:
        base: in BF16.

    Raises:
        BadInputError: there is something under that name, or the base is quantised.
        OSError: it cannot be written.
    """
    if base.quantised:
        raise BadInputError(f"{base.folder} is quantised", "link what prepare_model makes of it: give it --output")
    if folder.exists() or folder.is_symlink():
        raise BadInputError(f"{folder} is there already", "remove it, or give another --servable")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = [*base.files, *(path for path in (base.folder / INDEX_NAME,) if path.exists())]
    for path in weights:
        (part / path.name).symlink_to(path.resolve())
    copy_companions(base, output_config(base, "bf16", "copy" if base.mtp else "drop"), part)
    os.replace(part, folder)
