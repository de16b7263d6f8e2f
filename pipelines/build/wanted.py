"""What a build's options ask for, with the teacher loaded: everything that does not depend on calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from atcache.cache.coders import stored_coder
from atcache.cache.identity import CacheIdentity, Selection
from atcache.cache.record import CacheRecord
from atcache.codecs.base import Codec
from atcache.images.source import SampleIndex, Source
from atcache.store.parts import count_samples
from atcache.store.reader import CacheReader
from atcache.teachers.run import TeacherRun
from atcache.views.mixing import mix_policy

from ..fidelity import Expectation
from ..running.run_teacher import run_teacher
from .codec import choose_codec
from .config import BuildConfig
from .given_views import GivenViews
from .tasks import TaskRunner


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Wanted:
    """What a config asks for, with the teacher loaded."""

    run: TeacherRun
    codec: Codec
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    identity: CacheIdentity
    given: GivenViews | None
    """The cache whose views are taken; None if they are drawn."""

    @classmethod
    def of(
        cls,
        config: BuildConfig,
        index: SampleIndex,
        codec: Codec | None,
        load: Callable[[BuildConfig], TeacherRun],
        given: GivenViews | None,
    ) -> Wanted:
        """Load the teacher, and choose everything that does not depend on calibration; also the codec if it is None."""
        run = load(config)
        if given is None:
            mixing = mix_policy(config.mixup, config.cutmix, config.mix_prob)
            policy = run.teacher.input.view_policy(config.policy, config.seed, mixing, config.decoding, config.corrupt)
        else:
            policy = given.policy_for(run.teacher)
        if codec is None:
            codec = choose_codec(
                config.codec,
                config.target,
                run.teacher.model,
                count_samples(index) * config.views,
                queries=config.queries,
                store=config.store,
            )
        layers, heads = run.select(config.layers, config.heads)
        identity = CacheIdentity(
            teacher=str(run.teacher.name),
            weights_sha256=run.teacher.weights_sha256,
            input=run.teacher.input,
            precision="bfloat16" if run.dtype == torch.bfloat16 else "float32",
            fingerprint=index.fingerprint,
            num_samples=count_samples(index),
            policy=policy,
            num_views=config.views,
            pixels=config.pixels,
            selection=Selection(layers=layers, heads=heads, store=config.store, queries=config.queries),
            codec=codec.to_json(),
        )
        return cls(run=run, codec=codec, layers=layers, heads=heads, identity=identity, given=given)

    def runner(self, config: BuildConfig, own_processors: int, cache: CacheReader, index: SampleIndex) -> TaskRunner:
        """What runs tasks of this cache in one of the build's processes, which may use so many processors."""
        return TaskRunner(
            out=config.out,
            layout=cache.layout,
            source=Source(index),
            policy=self.identity.policy,
            run=self.run,
            coder=stored_coder(cache, self.codec, CacheRecord.of(cache).geometry, str(self.run.device)),
            batch_size=config.batch_size,
            workers=own_processors - 1 if config.workers is None else config.workers,
            threads=own_processors,
            skip_bad=config.on_bad_image == "skip",
            expectation=Expectation.of_cache(cache.path, CacheRecord.of(cache)),
            replayed=None if self.given is None else self.given.replayed(index),
        )


def load_teacher(config: BuildConfig) -> TeacherRun:
    """The teacher, ready to run."""
    return run_teacher(config.teacher, config.weights, device=config.device, precision=config.precision)
