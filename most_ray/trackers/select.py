"""Which trackers a run uses. A new tracker is listed here, and has its keys in `config`."""

from __future__ import annotations

import logging
import os

from most_ray.config import RunConfig
from most_ray.trackers.base import Background, Secret, Tracker, one_line
from most_ray.trackers.tensorboard import TensorBoard
from most_ray.trackers.wandb import Wandb

logger = logging.getLogger(__name__)


def trackers_of(config: RunConfig, run_uri: str, key: Secret | None) -> list[Tracker]:
    """The trackers of a run, for rank 0. None of them can hold up training or end it. `key`: of W&B."""
    used: dict[str, Tracker] = {}
    if uses_wandb(config):
        used["Weights & Biases"] = Wandb(config, run_uri, key)
    if config.tensorboard:
        used["TensorBoard"] = TensorBoard(run_uri)
    return [Background(name, tracker, key) for name, tracker in used.items()]


def tracker_notes(config: RunConfig) -> list[str]:
    """Where each tracker keeps a run, for the first screen."""
    notes = ["TensorBoard files in tensorboard/"] if config.tensorboard else []
    if uses_wandb(config):
        modes = {"online": "online", "offline": "offline, in wandb/"}
        mode = modes.get(config.wandb_mode or "", "online where there is a key, else offline")
        notes.append(f"Weights & Biases, project {config.wandb_project} ({mode})")
    return notes


def uses_wandb(config: RunConfig) -> bool:
    return bool(config.wandb_project) and config.wandb_mode != "disabled"


def wandb_key(config: RunConfig) -> Secret | None:
    """The key of W&B as its library finds it on this machine (WANDB_API_KEY, netrc), if the run can use it."""
    if not uses_wandb(config) or config.wandb_mode == "offline":
        return None
    text = os.environ.get("WANDB_API_KEY")
    if not text:
        try:
            from wandb import setup  # heavy, and used by few runs
            from wandb.sdk.lib import wbauth

            text = wbauth.read_netrc_auth(host=setup().settings.base_url)
        except Exception as error:  # noqa: BLE001 - the look-up is not W&B's public interface: without it, no key is found
            logger.warning("the key of W&B could not be looked up: %s", one_line(error))
    return Secret(text) if text else None
