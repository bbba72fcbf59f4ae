"""The structs of csrc/onecard.h for ctypes, field by field.

A struct that holds addresses does not keep what lies there alive: its owner does.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p

PLAIN, TABLE, TABLES, SPARSE, PATTERN = 0, 1, 2, 3, 4
BY_BLOCK, BY_ROW, BY_SCALE = 0, 1, 2
RMS, LAYER = 0, 1
SILU, RELU, GELU, GELU_TANH = 0, 1, 2, 3
PRE, POST, SANDWICH, PARALLEL = 0, 1, 2, 3


class Matrix(Structure):
    """oc_matrix: a matrix in the kernel layout; no `data`, no matrix."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64), ("columns", c_int64),
        ("bits", c_int32), ("block", c_int32), ("dtype", c_int32), ("zero_point", c_int32),
        ("exact", c_int32), ("kind", c_int32),
        ("slots", c_int64),
        ("rounding", c_int32), ("input_scale", c_float),
        ("bias", c_void_p),
        ("right", c_void_p), ("rest", c_void_p),
    )  # fmt: skip


class Norm(Structure):
    """oc_norm"""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("kind", c_int32), ("eps", c_float))


class Mlp(Structure):
    """oc_mlp"""

    _fields_ = (
        ("width", c_int32), ("activation", c_int32),
        ("gate", Matrix), ("up", Matrix), ("down", Matrix),
    )  # fmt: skip


class Layer(Structure):
    """oc_layer"""

    _fields_ = (
        ("order", c_int32),
        ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32),
        ("window", c_int32), ("rope", c_int32),
        ("scale", c_float), ("soft_cap", c_float),
        ("attention_in", Norm), ("attention_out", Norm),
        ("feed_forward_in", Norm), ("feed_forward_out", Norm),
        ("q_norm", Norm), ("k_norm", Norm),
        ("q", Matrix), ("k", Matrix), ("v", Matrix), ("o", Matrix),
        ("experts", c_int32), ("top", c_int32), ("renormalize", c_int32),
        ("router", Matrix), ("shared_gate", Matrix),
        ("shared", c_int32),
        ("mlps", ctypes.POINTER(Mlp)),
    )  # fmt: skip


class Rope(Structure):
    """oc_rope"""

    _fields_ = (("inverse", c_void_p), ("half", c_int32), ("scale", c_float))


class Model(Structure):
    """oc_model"""

    _fields_ = (
        ("vocab", c_int64), ("hidden", c_int64), ("embed", c_int64),
        ("layers", c_int32), ("ropes", c_int32),
        ("layer", ctypes.POINTER(Layer)), ("rope", ctypes.POINTER(Rope)),
        ("embedding", c_void_p), ("embedding_dtype", c_int32), ("embed_scale", c_float),
        ("positions", c_void_p), ("learned", c_int64), ("position_offset", c_int64),
        ("project_in", Matrix), ("project_out", Matrix),
        ("norm", Norm), ("head", Matrix),
        ("soft_cap", c_float),
    )  # fmt: skip


class Sampling(Structure):
    """oc_sampling"""

    _fields_ = (
        ("temperature", c_double), ("top_p", c_double), ("min_p", c_double),
        ("repetition", c_double), ("presence", c_double), ("frequency", c_double),
        ("top_k", c_int64),
        ("previous", c_void_p), ("count", c_int64), ("prompt", c_int64),
        ("draw", c_double),
        ("logprob", c_void_p), ("likeliest", c_int32), ("ids", c_void_p), ("logprobs", c_void_p),
    )  # fmt: skip


class EngineSettings(Structure):
    """oc_engine_settings"""

    _fields_ = (("threads", c_int32), ("kv_dtype", c_int32), ("pages", c_int64), ("rows", c_int64))


class Quantized(Structure):
    """oc::Quantized of csrc/engine.h: rows [16 rows x 64 columns in a chunk] and their scales and sums."""

    _fields_ = (
        ("q", c_void_p), ("scale", c_void_p), ("sum", c_void_p),
        ("stride", c_int64), ("blocks", c_int64), ("block", c_int32),
    )  # fmt: skip


NONE, LAST, ALL = 0, 1, 2


class Feed(Structure):
    """oc_feed"""

    _fields_ = (
        ("ids", c_void_p), ("count", c_int64), ("past", c_int64), ("table", c_void_p),
        ("want", c_int32), ("most", c_int32), ("logits", c_void_p),
        ("sampling", Sampling),
        ("draws", c_void_p), ("ends", c_void_p), ("ends_count", c_int64),
        ("chosen", c_void_p), ("logprobs", c_void_p),
        ("likeliest_ids", c_void_p), ("likeliest_logprobs", c_void_p),
        ("chosen_count", c_int32), ("status", c_int32),
    )  # fmt: skip
