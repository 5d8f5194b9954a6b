"""Which trackers a run uses. A new tracker is listed here, and has its keys in `config`."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Literal

from most_ray.config import RunConfig
from most_ray.errors import ConfigError, nearest
from most_ray.trackers.base import Background, Secret, Tracker, one_line
from most_ray.trackers.tensorboard import TensorBoard
from most_ray.trackers.wandb import Wandb

logger = logging.getLogger(__name__)


# Values of WANDB_MODE, W&B's own variable, and what they mean for a run that states no wandb_mode.
_ENVIRONMENT_MODES: dict[str, Literal["online", "offline", "disabled"]] = {
    "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled",
}  # fmt: skip


def with_environment(config: RunConfig) -> RunConfig:
    """The configuration with the mode of W&B that the environment states, by WANDB_MODE, where it states none itself. Raises ConfigError
    for an unknown mode. Applied where a run is started, since its workers may have another environment, and again in them."""
    mode = _environment_mode(config)
    if config.wandb_mode is not None or mode in (None, "online"):  # online needs a key: where there is none, a run is kept offline
        return config
    return replace(config, wandb_mode=mode)


def _environment_mode(config: RunConfig) -> Literal["online", "offline", "disabled"] | None:
    """What WANDB_MODE states; None where it is not set, or the run has no project."""
    given = os.environ.get("WANDB_MODE")
    if not given or not config.wandb_project:
        return None
    if given.lower() not in _ENVIRONMENT_MODES:
        raise ConfigError("WANDB_MODE", given, "is no mode of Weights & Biases.", nearest(given, ("online", "offline", "disabled")))
    return _ENVIRONMENT_MODES[given.lower()]


def trackers_of(config: RunConfig, run_uri: str, key: Secret | None) -> list[Tracker]:
    """The trackers of a run, for rank 0. None of them can hold up training or end it. `key`: of W&B."""
    config, used = with_environment(config), dict[str, Tracker]()
    if uses_wandb(config):
        used["Weights & Biases"] = Wandb(config, run_uri, key)
    if config.tensorboard:
        used["TensorBoard"] = TensorBoard(run_uri)
    return [Background(name, tracker, key) for name, tracker in used.items()]


def tracker_notes(config: RunConfig) -> list[str]:
    """Where each tracker keeps a run, for the first screen, and what overrules the mode that the environment states."""
    notes = ["TensorBoard files in tensorboard/"] if config.tensorboard else []
    stated, config = _environment_mode(config), with_environment(config)
    if config.wandb_project:
        modes = {None: "online where there is a key, else offline", "offline": "offline, in wandb/"}
        mode = modes.get(config.wandb_mode, str(config.wandb_mode))
        if stated and config.wandb_mode and stated != config.wandb_mode:
            mode += f": wandb_mode overrules WANDB_MODE={os.environ['WANDB_MODE']}"
        if uses_wandb(config) or stated:
            notes.append(f"Weights & Biases, project {config.wandb_project} ({mode})")
    return notes


def uses_wandb(config: RunConfig) -> bool:
    return bool(config.wandb_project) and with_environment(config).wandb_mode != "disabled"


def wandb_key(config: RunConfig) -> Secret | None:
    """The key of W&B as its library finds it on this machine (WANDB_API_KEY, netrc), if the run can use it."""
    if not uses_wandb(config) or with_environment(config).wandb_mode == "offline":
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
