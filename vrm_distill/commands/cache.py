"""``vrm-distill cache``: ask a trained teacher for all that the students of a run will want to know of it."""

from collections.abc import Sequence

from vrm_distill import log, options
from vrm_distill.cache import open_cache, teacher_views
from vrm_distill.commands.train import prepare
from vrm_distill.failures import Refused
from vrm_distill.log import progress_bar
from vrm_distill.models import create_model
from vrm_distill.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Takes the options of the run; trains nothing, and computes only the logits that are not there."""
    given = options.parse(argv)
    if given.teacher_cache is None:
        raise Refused("--teacher-cache", "name the folder to fill")
    settings, data, teacher, accelerator, notes = prepare(given)
    if teacher is None:
        raise Refused("--teacher-checkpoint", "name a trained teacher: what it says of the views is what is kept")
    console = log.console(quiet=not accelerator.is_main_process)
    for note in (*data.notes, *notes):
        console.print(f"note: {note}")
    teacher = teacher.to(accelerator.device).eval()
    # Seeds that share their views need one pass.
    seeds = settings.all_seeds if settings.view_epochs is None else settings.all_seeds[:1]
    with progress_bar(console) as progress:
        bar = progress.add_task("caching", total=len(seeds) * settings.views(settings.seed)["view_epochs"])
        for seed in seeds:
            cache = open_cache(settings, data, teacher, accelerator, seed)
            student = create_model(settings.student, data.in_channels, data.classes).to(accelerator.device)
            views = settings.views(seed)
            trainer = Trainer(accelerator, student, data, settings, None, epochs=cache.epochs, lr=settings.lr, **views)
            for epoch in range(cache.epochs):
                for place, real, virtual, _ in trainer.replay(epoch):
                    with accelerator.autocast():
                        teacher_views(teacher, place, real, virtual, cache)
                progress.advance(bar)
            trainer.close()
    console.print(f"{settings.teacher_cache}: {cache.size} of logits for each of {len(seeds)} seeds")
    return 0
