"""The kinds of features, the settings that a text or a units manifest names, and the extractors that these settings open."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from most_ray.errors import ConfigError, shown
from most_ray.io import storage
from most_ray.io.uris import expand
from most_ray.speech.units.features import EncoderSettings, Extractor, FeatureSettings
from most_ray.speech.units.mfcc import MfccExtractor, MfccSettings


class Kind(NamedTuple):
    """Features that need no model."""

    settings: Callable[..., FeatureSettings]
    extractor: Callable[[Any], Extractor]  # takes the settings


KINDS: Mapping[str, Kind] = {"mfcc": Kind(MfccSettings, MfccExtractor)}  # by their name on the command line and in units.json


def parse_features(text: str) -> FeatureSettings:
    """Parse one of KINDS, or KIND:SOURCE:LAYER as hubert:hf:facebook/hubert-base-ls960:9. A source that is a folder becomes an absolute
    path. Raises ConfigError if the text is of neither form."""
    if text in KINDS:
        return KINDS[text].settings()
    kind, _, rest = text.partition(":")
    source, _, layer = rest.rpartition(":")
    if not kind or not source or not re.fullmatch(r"[0-9]{1,4}", layer):
        remedy = "As hubert:hf:facebook/hubert-base-ls960:9, or wavlm:DIR:6."
        raise ConfigError("features", text, f"is neither {', '.join(KINDS)} nor KIND:NAME_OR_PATH:LAYER.", remedy)
    source = storage.absolute_if_exists(expand("features", source))  # other processes have other working directories
    return EncoderSettings(kind, source, int(layer))


def open_extractor(settings: FeatureSettings, device: str | None = None) -> Extractor:
    """The extractor with these settings, on a torch device where it uses one (None: a GPU if there is one). Raises ConfigError or
    CheckpointError if the encoder does not exist, or does not have that layer."""
    if not isinstance(settings, EncoderSettings):
        return next(kind.extractor(settings) for kind in KINDS.values() if kind.settings is type(settings))
    import torch  # takes seconds to import, as does transformers, and the other kinds do without

    from most_ray.speech.units.encoder import EncoderExtractor

    return EncoderExtractor(settings, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def manifest_settings(manifest: Mapping[str, Any], source: str | None = None) -> FeatureSettings:
    """The settings of the features that a units manifest names; `source`: folder or name on the hub of the encoder (None: the one that it
    names). Raises KeyError, TypeError or ValueError if it does not describe its features."""
    identity = manifest["identity"]
    if kind := KINDS.get(identity["features"]):
        return kind.settings(**identity["settings"])
    layer = identity["settings"]["layer"]
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer {shown(layer)} is none")
    return EncoderSettings(identity["features"], source or manifest["encoder"], layer)
