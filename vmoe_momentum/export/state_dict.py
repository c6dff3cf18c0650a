"""Plain tensors under timm's names, and in the metadata how to build their network."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from ..models import PixelModel
from ..models.saved import rebuild
from .asked import Request
from .base import Answer, Format, Metadata, Servable, as_answer

FILE = "model.safetensors"


def write(model: PixelModel, folder: Path, request: Request, metadata: Metadata) -> Metadata:
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.net.state_dict().items()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    return {"file": FILE}


def open_network(folder: Path, metadata: Metadata) -> PixelModel:
    model = rebuild(str(folder), metadata["network"])
    try:
        model.net.load_state_dict(load_file(folder / FILE))
    except Exception as error:  # damaged bytes, or another network's
        raise ValueError(f"{folder / FILE}: damaged, or of another network ({error}); export it again") from error
    return model.eval()


def open_answer(folder: Path, metadata: Metadata, device: str = "cpu") -> Answer:
    asked = Request(metadata["input"], metadata["output"])
    return as_answer(Servable(open_network(folder, metadata), asked), device)


FORMAT = Format(write, open_answer, open_network)
