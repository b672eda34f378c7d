"""``vrm-distill eval FILE``: judge a checkpoint on the test images of a dataset."""

from collections.abc import Sequence

import torch

from vrm_distill import options as command
from vrm_distill.checkpoint import read_weights
from vrm_distill.commands.common import open_data, pick_device, read_network
from vrm_distill.data import plain_loader, takes_image_size
from vrm_distill.engine import count_correct
from vrm_distill.failures import Refused
from vrm_distill.models import check_classes


def main(argv: Sequence[str]) -> int:
    parser = command.Parser(prog="vrm-distill eval", description="Judge a checkpoint on the test images of a dataset.")
    command.add_checkpoint(parser)
    command.add_data(parser)
    command.add_machine(parser)
    options = parser.parse_args(argv)
    try:
        _, metadata = read_weights(options.checkpoint)
    except (OSError, ValueError) as error:
        raise Refused("FILE", error) from error
    trained = [int(x) for x in metadata.get("size", "").split()]
    if options.image_size is None and len(set(trained)) == 1 and takes_image_size(options.dataset):
        options.image_size = trained[0]
    data = open_data(options)
    try:
        network = read_network(options.checkpoint, options.network, "--network", data)
        check_classes("checkpoint's", network.name, network.model, data.in_channels, data.size, data.classes)
        data = data.with_statistics(*(getattr(options, key) or network.numbers(key) for key in ("mean", "std")))
    except (OSError, ValueError) as error:
        raise Refused("FILE", error) from error
    for note in (*data.notes, *network.notes):
        print(f"note: {note}")
    if trained and trained != list(data.size):
        height, width = data.size
        print(f"note: trained on images of {trained[0]}x{trained[1]}, judged on {height}x{width}")
    torch.set_num_threads(options.threads)
    device = pick_device(options)
    loader = plain_loader(data.test, workers=options.workers)
    correct, seen = count_correct(network.model.to(device), loader, device, data.normalized)
    print(f"{options.checkpoint}: {int(correct)} of {seen} test images of {data.name} ({int(correct) / seen:.2%})")
    return 0
