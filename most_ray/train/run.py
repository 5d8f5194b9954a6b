"""The engine by itself, without Ray, in one process or under torchrun:

    torchrun --nproc_per_node 2 -m most_ray.train.run --config jobs/configs/digits.yaml --ep_size 2

The same run in the same folder as `most-ray train` makes: either goes on where the other has stopped. The last step's weights are
exported; evaluating them is `most-ray evaluate`. SIGTERM stops it behind a checkpoint, with exit code 75. (torchrun itself then exits
with 1, and kills ranks that have not ended after its `--shutdown-timeout`, 30 s: give it the time that a save takes.)
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from most_ray import config as configuration
from most_ray.checkpoint import catalog
from most_ray.checkpoint.export import export_checkpoint
from most_ray.distributed.ranks import this_rank
from most_ray.errors import EXIT_STOPPED, CheckpointError, ConfigError, UserError
from most_ray.io import storage
from most_ray.runs.job import Job
from most_ray.runs.resolve import Prepared, keep_kit, prepare_run
from most_ray.train.hooks import TrainHooks
from most_ray.train.session import claim_run, run_rank

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train on this rank. 0: the goal was reached; 2: something that the user can mend; 75: stopped as asked, behind a checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(prog="python -m most_ray.train.run", description=str(__doc__).split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of the keys below; flags overrule it")
    configuration.add_flags(parser)
    args = parser.parse_args(argv)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(world)
    try:
        config = configuration.load_config(args.config, configuration.flag_values(args))
        job, prepared = _agree(config, world)
        reached = run_rank(job, device, TrainHooks(should_stop=stop.is_set))
        if reached and prepared:
            _export(prepared)
    except UserError as error:
        sys.stderr.write(f"most-ray: {error.kind}: {error}\n")
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not reached and prepared:
        sys.stderr.write("most-ray: stopped behind a checkpoint; the same command goes on\n")
    return 0 if reached else EXIT_STOPPED


def _device(world: int) -> torch.device:
    """This rank's device; the process group comes up with it."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def _agree(config: configuration.RunConfig, world: int) -> tuple[Job, Prepared | None]:
    """Rank 0 prepares the run; all get its job. What rank 0 complains of it alone says: the others leave with its exit code."""
    decision: list[Any] = [None]
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=24)) if dist.is_initialized() else None
    prepared, cuda = None, torch.cuda.is_available()
    if cuda and config.use_gpu is False:
        raise ConfigError("use_gpu", False, "but this machine has GPUs.", "Hide them: CUDA_VISIBLE_DEVICES=.")
    if this_rank() == 0:
        try:
            prepared = prepare_run(replace(config, use_gpu=cuda), workers=world)
            if prepared.done_steps > prepared.job.total_steps:
                rule = f"lies behind the run's newest checkpoint (step {prepared.done_steps})."
                raise ConfigError("max_steps", prepared.job.total_steps, rule, "Raise it or rename the run.")
            unused = [name for name in ("eval_steps", "tensorboard", "wandb_project") if getattr(config, name)]
            if unused:
                logger.warning("without Ray there are no evaluations and trackers: %s not used", ", ".join(unused))
            decision = [prepared.job_for(prepared.topologies[-1], claim_run(prepared.folder))]
            keep_kit(prepared)
            storage.write_bytes(prepared.folder.at("config.yaml"), configuration.to_yaml(config.redacted()).encode())
        except UserError as error:
            decision = [error]
    if dist.is_initialized():
        # Rank 0 may take records in for hours before the others hear of it.
        dist.broadcast_object_list(decision, src=0, group=patient)
    if isinstance(decision[0], UserError):
        raise decision[0] if this_rank() == 0 else SystemExit(decision[0].exit_code)
    return decision[0], prepared


def _export(prepared: Prepared) -> None:
    """Rank 0: the last step's weights in Hugging Face layout.

    Raises:
        CheckpointError: there are none.
    """
    folder = prepared.folder
    last = catalog.step_uri(folder.checkpoints, prepared.job.total_steps)
    if last not in catalog.committed(folder.checkpoints):
        raise CheckpointError("step", prepared.job.total_steps, "was not reached: no checkpoint of the last step was completed.")
    export_checkpoint(last, folder.local / "export")
    folder.push_folder("export", "config.json")


if __name__ == "__main__":
    sys.exit(main())
