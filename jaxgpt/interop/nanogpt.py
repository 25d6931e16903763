"""Read nanoGPT's ckpt.pt."""

from pathlib import Path
from typing import Any

from jaxgpt.config import UserError


def read_checkpoint(init_from: str, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint of nanoGPT's train.py -> the model's keys, torch tensors by name.

    nanoGPT's linear maps are [out, in]; they are transposed to GPT-2's [in, out].
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"init_from={init_from!r}: reading {file} needs PyTorch: torch") from error
    try:
        # weights_only unpickles tensors and plain containers, and runs no code
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        args, tensors = checkpoint["model_args"], checkpoint["model"]
        names = "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias"
        keys = {name: args[name] for name in names} | {"mlp": "gelu", "mlp_dim": 0}
        return keys, {name: _transposed(name, tensor) for name, tensor in tensors.items()}
    except Exception as error:  # torch raises many kinds, and advises to let a pickle run
        raise UserError(f"{file}: not a checkpoint of nanoGPT ({type(error).__name__})") from error


def _transposed(name: str, tensor: Any) -> Any:
    is_linear = ".h." in name and tensor.ndim == 2
    return tensor.t() if is_linear else tensor
