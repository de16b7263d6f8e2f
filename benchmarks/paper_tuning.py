"""How `paper.py` chooses the learning rate and the start of LayerScale: alike for all modes, on held-out images."""

from __future__ import annotations

from paper_steps import Job, Maps, Recipe, Student, cache_job, train_job, tuning_folder
from paper_study import Study

from atcache.choices import MODES, Mode
from atcache.errors import ConfigError
from atcache.pipelines.running.run_folder import GIVEN_UP_FILE
from atcache.pipelines.train.scores import Score
from atcache.pipelines.train.summary import read_finished


def recipes_to_try(study: Study, mode: Mode) -> list[Recipe]:
    """The recipes of a mode: several if it is tuned. Weights of the teacher have their own LayerScale."""
    if mode == "finetune":
        return [Recipe(base_lr) for base_lr in study.finetune_lrs]
    return [Recipe(base_lr, start) for start in study.init_values for base_lr in study.base_lrs]


def tuning_jobs(study: Study) -> list[Job]:
    """What chooses recipes: every mode of `tune` tries all its recipes on the same images, but none twice in vain."""
    maps = Maps(study.views, study.codec)
    jobs = [cache_job(study, maps, "held-out")]
    for mode in study.tune:
        in_vain = given_up(study, mode)
        recipes = [one for one in recipes_to_try(study, mode) if one not in in_vain]
        jobs += [train_job(study, Student(mode, maps), 0, one, held_out=True) for one in recipes]
    return jobs


def tuned(study: Study, mode: Mode) -> dict[Recipe, Score]:
    """The scores on held-out images of the recipes that were tried."""
    summaries = {one: read_finished(tuning_folder(study, mode, one)) for one in recipes_to_try(study, mode)}
    return {one: found.validation for one, found in summaries.items() if found is not None and found.validation}


def given_up(study: Study, mode: Mode) -> list[Recipe]:
    """The recipes that were tried, but the loss became NaN or infinite."""
    return [one for one in recipes_to_try(study, mode) if (tuning_folder(study, mode, one) / GIVEN_UP_FILE).exists()]


def choose_recipes(study: Study) -> dict[Mode, Recipe] | None:
    """The recipe of each mode: the best on held-out images if it is tuned; None if that is not finished.

    Raises:
        ConfigError: the loss became NaN or infinite with all recipes of a mode.
    """
    best: dict[Mode, Recipe] = {}
    for mode in study.tune:
        scores, num_given_up = tuned(study, mode), len(given_up(study, mode))
        if len(scores) + num_given_up < len(recipes_to_try(study, mode)):
            return None
        if not scores:
            raise ConfigError(
                f"--tune: the loss of {mode} became NaN or infinite with each of its {num_given_up} recipes. Give "
                "another --out and lower --base-lr."
            )
        best[mode] = max(scores, key=lambda recipe: scores[recipe].top1)
    first = {mode: recipes_to_try(study, mode)[0] for mode in MODES}
    return {**first, "distill": best.get("copy", first["distill"]), **best}
