"""``vrm-distill export FILE --to OUT``: the student for other programs, as its weights alone or as ONNX."""

import argparse
import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from vrm_distill import options as command
from vrm_distill.checkpoint import write_atomically
from vrm_distill.commands.common import Trained, read_network
from vrm_distill.failures import Refused

# ONNX Runtime's logits may differ from torch's by this fraction of the largest.
_TOLERANCE = 1e-3


def main(argv: Sequence[str]) -> int:
    parser = command.Parser(prog="vrm-distill export", description=__doc__.splitlines()[0])
    command.add_checkpoint(parser)
    parser.add_argument(
        "--to",
        type=_target,
        required=True,
        metavar="OUT",
        help=".safetensors or .pt: the weights under the network's own names; .onnx: images [B, channels, height, "
        "width] in [0, 1] to logits, the normalisation in the graph, checked by onnxruntime if that is installed",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    options = parser.parse_args(argv)
    if options.to.exists() and not options.overwrite:
        raise Refused("--to", f"{options.to} exists: name another file, or add --overwrite")
    if not options.to.parent.is_dir():
        raise Refused("--to", f"there is no folder {options.to.parent}")
    if options.to.suffix == ".onnx" and (missing := [x for x in ("onnx", "onnxscript") if find_spec(x) is None]):
        raise Refused(
            "--to", f"for ONNX, in a clone of vrm_kernels pip install '.[onnx]' (there is no {', no '.join(missing)})"
        )
    try:
        network = read_network(options.checkpoint, options.network, "--network")
    except (OSError, ValueError) as error:
        raise Refused("FILE", error) from error
    said = ""
    if options.to.suffix == ".onnx":
        said = _onnx(network, options.to)
    elif options.to.suffix == ".safetensors":
        from safetensors.torch import save

        tensors = {name: x.contiguous().clone() for name, x in network.model.state_dict().items()}
        payload = save(tensors, {"format": "pt"})
        write_atomically(options.to, lambda file: file.write(payload))
    else:
        content = io.BytesIO()
        torch.save(network.model.state_dict(), content)
        write_atomically(options.to, lambda file: file.write(content.getbuffer()))
    print(f"{options.to}: {network.name}{said}")
    return 0


class _Normalised(nn.Module):
    """A network with its normalisation in front."""

    def __init__(self, network: Trained) -> None:
        super().__init__()
        self.model = network.model
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(network.numbers(key)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def _onnx(network: Trained, path: Path) -> str:
    """Write the network as ONNX; what was found when it was run there."""
    size = [int(x) for x in network.metadata.get("size", "").split()]
    if not size or not network.numbers("mean"):
        raise Refused("FILE", "its metadata do not say the images' size and normalisation: take student.safetensors")
    model = _Normalised(network).eval()
    # A batch of three, and of one below, so that no fixed batch size passes the check.
    images = torch.rand(3, int(network.metadata["in_channels"]), *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    with warnings.catch_warnings(action="ignore"):  # of torch's, on its own functions
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    kept = {key: network.metadata[key] for key in ("model", "class_names", "dataset") if network.metadata.get(key)}
    program.model.metadata_props.update(kept)
    payload = program.model_proto.SerializeToString()
    said = "; not checked: pip install onnxruntime"
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"])
        difference = 0.0
        for count in (1, len(images)):
            found = torch.from_numpy(session.run(None, {"images": images[:count].numpy()})[0])
            difference = max(difference, float((found - expected[:count]).abs().max() / expected.abs().max()))
        if not difference <= _TOLERANCE:
            raise ValueError(f"the logits of onnxruntime differ from torch's by {difference:.1e} of the largest")
        said = f"; onnxruntime gives torch's logits to {difference:.1e} of the largest"
    write_atomically(path, lambda file: file.write(payload))
    return said


def _target(text: str) -> Path:
    if (path := Path(text)).suffix not in (".onnx", ".safetensors", ".pt"):
        raise argparse.ArgumentTypeError(f"must end in .onnx, .safetensors or .pt, got {text}")
    return path
