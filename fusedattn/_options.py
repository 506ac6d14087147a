"""The options of every op, numbers that both its raw operators take, in the order of ``csrc/<op>/options.h``."""

from typing import Any, NamedTuple

# Of scores, by name, numbered as ScoreActivation in csrc/additive_attention/options.h.
SCORE_ACTIVATIONS = {"tanh": 0, "sigmoid": 1, "relu": 2, "leaky_relu": 3}


class AdditiveAttentionOptions(NamedTuple):
    is_causal: bool
    scale: float
    softcap: float  # 0: none
    activation: int  # a number of SCORE_ACTIVATIONS
    negative_slope: float  # of leaky_relu


class AdditiveScoresOptions(NamedTuple):
    scale: float
    softcap: float  # 0: none
    activation: int  # a number of SCORE_ACTIVATIONS
    negative_slope: float  # of leaky_relu


class AttentionPoolOptions(NamedTuple):
    """None so far."""


class FilmOptions(NamedTuple):
    channel_dim: int
    gamma_offset: float
    activation: int  # index into ACTIVATIONS of _conditioning.py


class GatedFilmOptions(NamedTuple):
    channel_dim: int


class NormFilmOptions(NamedTuple):
    norm: int  # index into NORMS of ops/norm_film.py
    num_groups: int  # of group norm
    training: bool  # statistics are those of the input
    eps: float
    channel_dim: int
    gamma_offset: float
    activation: int  # as in FilmOptions


def schema(bundle: type[Any]) -> str:
    """A NamedTuple's fields as arguments in an operator's schema, ``"bool is_causal, float scale"``."""
    arguments = []
    for name, kind in bundle.__annotations__.items():
        default = f"={bundle._field_defaults[name]}" if name in bundle._field_defaults else ""
        arguments.append(f"{kind.__name__} {name}{default}")
    return ", ".join(arguments)
