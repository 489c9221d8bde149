"""The only training loop: every stage, fresh or resumed, on any mesh.

Where the parameters come from, in this order:
  1. the newest checkpoint of the workdir, if it has one (same config, checked): the run goes on;
  2. `config.checkpoint.init_from`, another run's workdir, and `config.text.checkpoint`, converted
     BERT weights: the parameters that they have, step 0;
  3. fresh, from the seed.
The frozen teacher always comes from `config.teacher.checkpoint`.
"""

import dataclasses
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

import instap_jax
from instap_jax import sharding
from instap_jax.errors import AgreedFault, UserError
from instap_jax.progress import Progress
from instap_jax.train import checkpoint, dump, flops, inputs
from instap_jax.train.clock import StepClock
from instap_jax.train.feed import Fed, Feed
from instap_jax.train.guard import Alarm, Guard
from instap_jax.train.initialise import initial_params, load_frozen
from instap_jax.train.metrics import MetricWriter, StepMeans
from instap_jax.train.peers import Agreement, Watchdog
from instap_jax.train.profiling import Tracer, use_compile_cache
from instap_jax.train.program import Program, build_program
from instap_jax.train.saving import Checkpointer
from instap_jax.train.selection import MakeValidate, Selection
from instap_jax.train.state import TrainState
from instap_jax.train.stop import Ask, StopRequest


def train(
    config: ConfigDict,
    workdir: Path,
    stop: StopRequest,
    make_validate: MakeValidate | None = None,
) -> TrainState:
    """Trains until `config.steps` (or `config.stop_at`), resuming what the workdir holds.

    Args:
      config: resolved and checked.
      workdir: exists; holds nothing or a run of the same config.
      stop: asked at every step; a fresh `StopRequest()` never asks.
      make_validate: gives what measures parameters every `config.evaluation.every` steps
        (`evaluation.validation.make_validate`); needed where that is set.

    Returns:
      The final state.

    Raises:
      UserError: for faults of the input: data, teacher, checkpoint, non-finite loss.
      Stopped: when `stop` of any process asked (`Preempted` for SIGTERM); all have saved the same
        step.
    """
    mesh = sharding.make_mesh(config.mesh)
    use_compile_cache(config, workdir, mesh)
    with jax.set_mesh(mesh), Watchdog(config.distributed.step_timeout) as watchdog:
        program = build_program(config, mesh)
        with Checkpointer(
            str(workdir),
            every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            retries=config.checkpoint.retries,
            retry_seconds=config.checkpoint.retry_seconds,
        ) as checkpointer:
            try:
                selection = Selection(config, workdir, program, mesh, make_validate)
                return _run(config, workdir, mesh, program, checkpointer, stop, selection, watchdog)
            except KeyboardInterrupt:
                checkpointer.wait()  # for a save in progress
                step = checkpointer.latest_step()
                if _is_main():
                    line = f"\nstopped; the same command goes on from step {step or 0}"
                    print(line, file=sys.stderr)
                raise


def _run(
    config,
    workdir,
    mesh,
    program: Program,
    checkpointer: Checkpointer,
    stop: StopRequest,
    selection: Selection,
    watchdog: Watchdog,
) -> TrainState:
    found = inputs.identify(config)
    frozen = load_frozen(config, program, step=found["teacher"])
    state, kept = _start(config, workdir, program, checkpointer)
    start = int(state.step)
    last = min(config.steps, config.stop_at or config.steps)
    if start >= last:
        if _is_main():
            print(f"{workdir}: already trained to step {start}")
        return state
    if _is_main():
        print(_summary(config, mesh, state, start, last))
    guard = Guard(config, (kept or {}).get("guard"))
    both = bool(config.data.videos and config.data.images)
    means = StepMeans(split=both, kept=(kept or {}).get("log"))
    feed = Feed(config, mesh, start_step=start, state=kept)
    owed = bool(kept and kept.get("unvalidated") and selection.due(start))
    writer = None
    if _is_main():
        writer = MetricWriter(workdir, config, resume_step=start, unvalidated=owed)
    tools = checkpointer, feed, writer, means, stop, selection, guard, watchdog
    run = _Run(config, workdir, mesh, program, *tools, made_with=found)
    try:
        if owed:
            run.validate(state, start)
        return run.steps(state, frozen, start, last)
    finally:
        feed.close()
        if writer:
            writer.close()


class _Run:
    """The steps of one process, from `start` to `last`."""

    def __init__(
        self,
        config,
        workdir: Path,
        mesh,
        program,
        checkpointer: Checkpointer,
        feed: Feed,
        writer: MetricWriter | None,
        means: StepMeans,
        stop: StopRequest,
        selection: Selection,
        guard: Guard,
        watchdog: Watchdog,
        *,
        made_with: dict,
    ):
        self._selection, self._guard, self._workdir = selection, guard, workdir
        self._config, self._mesh, self._program, self._stop = config, mesh, program, stop
        self._checkpointer, self._feed = checkpointer, feed
        self._writer, self._means, self._watchdog = writer, means, watchdog
        self._inputs = made_with
        self._flops: dict = {}
        self._clock = StepClock()
        self._agreement = Agreement(mesh)

    def steps(self, state: TrainState, frozen: nnx.State, start: int, last: int) -> TrainState:
        pending = None  # metrics are read one step late, so that the device never waits for us
        label = f"train {self._config.stage}"
        with (
            Progress(label, last, done=start, unit="steps") as progress,
            Tracer(self._config.log.profile, self._workdir) as tracer,
        ):
            for step in range(start + 1, last + 1):
                waited = time.perf_counter()
                fed = next(self._feed)
                self._clock.wait(time.perf_counter() - waited)
                self._checkpointer.check()
                first = self._clock.compiles(fed.kind)
                if first:
                    jax.block_until_ready(state)  # else the step before would run untimed meanwhile
                what = f"compiling the {fed.kind} step"
                with (
                    progress.waiting(what) if first else nullcontext(),
                    self._clock.calling(fed.kind),
                ):
                    self._measure_flops(state, frozen, fed)
                    state, metrics = tracer.step(
                        step, self._program.step, state, frozen, fed.batch, self._program.seed
                    )
                self._stop.hold()  # from here on there is something to save
                asked = self._agree()
                if pending:
                    progress.update(note=self._finish(*pending, state))
                pending = (step, metrics, fed)
                ends = asked is not Ask.NOTHING and step < last
                due = self._selection.due(step)
                save = ends or step == last or self._checkpointer.due(step)
                if due or save:  # what is measured or saved is known to be finite
                    progress.update(note=self._finish(*pending, state))
                    pending = None
                # Before the checkpoint: none is resumed past it. But not where this machine is
                # about to be taken away: the resumed run then begins with it.
                if due and not ends:
                    self.validate(state, step)
                if save:
                    self._save(
                        state, step, fed, wait=ends or step == last, unvalidated=due and ends
                    )
                if ends:
                    asked.raise_()
                self._watchdog.step()
        return state

    def _agree(self) -> Ask:
        """What any process asks for, at the same step in all of them.

        Raises:
          AgreedFault: the data, of one process or of all together, have too many faults.
        """
        mine = Ask.FAULT if self._feed.fault else self._stop.asked
        asked, news = self._agreement.exchange(mine, self._feed.news())
        try:
            if asked is Ask.FAULT:
                raise self._feed.fault or UserError("stopped: another process says why")
            self._feed.judge(news)
        except UserError as error:
            raise AgreedFault(str(error)) from error
        return asked

    def _finish(self, step: int, metrics, fed: Fed, state: TrainState) -> str:
        """Waits for a step, judges and writes its metrics; returns a short note.

        `state`: after this step, or after the one that was started since.
        """
        scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if alarm := self._guard.judge(fed.kind, scalars):
            self._sound(alarm, step, fed, state, scalars)
        self._clock.step(fed.samples, self._flops.get(fed.kind))
        self._means.add(fed.kind, {k: v for k, v in scalars.items() if k != "refused"})
        if step % self._config.log.every == 0 or step == 1:
            line = self._means.read() | self._clock.read() | self._counts()
            if self._writer:
                self._writer.write(step, line)
        return f"loss {scalars['loss']:.4f}"

    def _sound(
        self, alarm: Alarm, step: int, fed: Fed, state: TrainState, scalars: dict[str, float]
    ) -> None:
        """Prints an alarm, or ends the run with it and with what replays the step.

        After a refused update that ends the run the state stays what it was before that step.
        """
        line = f"step {step}: {alarm.what}; samples {_some(self._feed.sample_ids(fed))}"
        if not alarm.stop:
            print(line, file=sys.stderr)
            return
        if alarm.refused:
            facts = self._meta() | {
                "step": step,
                "metrics": {k: str(v) for k, v in scalars.items()},
            }
            line += f"; {dump.write(self._workdir, state, fed.batch, step=step, meta=facts)}"
        last = self._checkpointer.latest_step() or 0
        raise AgreedFault(f"{line}; stopped. The last checkpoint is from step {last}")

    def _counts(self) -> dict[str, float]:
        """What went wrong so far: samples without data by reason, updates and losses."""
        faults = self._feed.fault_counts().items()
        return {f"faults/{name}": float(n) for name, n in faults} | self._guard.counts()

    def validate(self, state: TrainState, step: int) -> None:
        """Measures the parameters and keeps them if they are the best; no part of a step's time."""
        start = time.perf_counter()
        scalars = self._selection.measure(state.params, step, self._meta())
        if self._writer:
            self._writer.write(step, scalars | self._counts())
        self._clock.leave_out(time.perf_counter() - start)

    def _measure_flops(self, state, frozen, fed: Fed) -> None:
        """Counts a kind's model FLOPs at its first batch, where the chip's peak is known."""
        peak = flops.peak_flops(self._mesh.devices.flat[0])
        if peak is None or fed.kind in self._flops:
            return
        without_remat = self._config.copy_and_resolve_references()
        without_remat.compute.update(remat="all", attention="xla")  # products in kernels hide
        program = build_program(without_remat, self._mesh)
        count = flops.count_flops(program.step, state, frozen, fed.batch, program.seed)
        self._flops[fed.kind] = count / (peak * self._mesh.size)

    def _meta(self) -> dict:
        return {
            "stage": self._config.stage,
            "config": self._config.to_dict(),
            "inputs": self._inputs,
            "version": instap_jax.__version__,
            "time": time.time(),
        }

    def _save(
        self, state: TrainState, step: int, fed: Fed, *, wait: bool, unvalidated: bool
    ) -> None:
        """`unvalidated`: a validation of this step was due and is owed by who goes on."""
        if self._writer:
            self._writer.sync()
        data = fed.state | {"guard": self._guard.state(), "log": self._means.state()}
        data |= {"unvalidated": unvalidated}
        self._checkpointer.save(state, step, data=data, meta=self._meta(), wait=wait)


def _start(config, workdir: Path, program: Program, checkpointer) -> tuple[TrainState, dict | None]:
    if checkpointer.resumed is not None:
        _, meta = checkpoint.read_meta(str(workdir))
        inputs.check_same(config, meta, str(workdir))
        return checkpointer.restore(program.abstract)
    state = program.init()
    if config.checkpoint.init_from or config.text.checkpoint:
        params = initial_params(config, program.objective, program.abstract.params, state.params)
        state = dataclasses.replace(state, params=params)
    return state, None


def _some(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _is_main() -> bool:
    return jax.process_index() == 0


def _summary(config, mesh: Mesh, state: TrainState, start: int, last: int) -> str:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return (
        f"{config.stage}: {parameters / 1e6:.1f} M parameters on {mesh.size} "
        f"{mesh.devices.flat[0].platform} device(s) ({shape}), {config.data.batch_size} samples a "
        f"step, steps {start + 1} to {last}"
    )
