"""The options of every op, numbers that both its raw operators take, in the order of ``csrc/<op>/options.h``."""

from typing import Any, NamedTuple

# Of scores, by name, numbered as ScoreActivation in csrc/additive_attention/options.h.
SCORE_ACTIVATIONS = {"tanh": 0, "sigmoid": 1, "relu": 2, "leaky_relu": 3}


class AdditiveAttentionOptions(NamedTuple):
    window_left: int  # keys before a query's center that it sees; -1: all
    window_right: int  # and after it
    scale: float
    softcap: float  # 0: none
    activation: int  # a number of SCORE_ACTIVATIONS
    negative_slope: float  # of leaky_relu
    dropout_p: float = 0.0  # with a seed alone, as Place of _philox.py, which follows
    first_head: int = 0
    heads: int = 0
    first_query: int = 0
    first_key: int = 0

    @property
    def has_window(self) -> bool:
        return self.window_left >= 0 or self.window_right >= 0


class AdditiveAttentionVarlenOptions(NamedTuple):
    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int  # from here on as in AdditiveAttentionOptions
    window_right: int
    scale: float
    softcap: float
    activation: int
    negative_slope: float

    @property
    def of_attention(self) -> AdditiveAttentionOptions:
        return AdditiveAttentionOptions(*self[2:])


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


class HardAdditiveAttentionOptions(NamedTuple):
    """A :class:`fusedattn._philox.Place`."""

    first_head: int
    heads: int
    first_query: int
    first_key: int


class NormFilmOptions(NamedTuple):
    norm: int  # index into NORMS of ops/norm_film.py
    num_groups: int  # of group norm
    training: bool  # statistics are those of the input
    eps: float
    channel_dim: int
    gamma_offset: float
    activation: int  # as in FilmOptions


def schema(bundle: type[Any], are_last: bool = False) -> str:
    """A NamedTuple's fields as arguments in an operator's schema, ``"int window_left, float scale"``.

    Only the last arguments of a schema may have defaults: theirs, if these are.
    """
    defaults = {name: f"={value}" for name, value in bundle._field_defaults.items() if are_last}
    kinds = bundle.__annotations__.items()
    return ", ".join(f"{kind.__name__} {name}{defaults.get(name, '')}" for name, kind in kinds)
