"""Pickles that would run code, exhaust memory, hang or crash the standard unpickler."""

from __future__ import annotations

import builtins
import os
import pickle
import posix
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.torch_pickles import numbers, pickled, storage, tensor, text


class Call:
    """An object whose pickle is a call, which unpickling would make."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self):
        return self._call


def hostile_pickles(flag: Path) -> dict[str, bytes]:
    """Returns pickles that create `flag`, exhaust memory, hang or crash the standard unpickler."""
    touch, code = f"touch {flag}", f"open({str(flag)!r}, 'w')"
    call = {
        "os.system": Call(os.system, touch),
        "posix.system": Call(posix.system, touch),
        "builtins.eval": Call(builtins.eval, code),
        "builtins.exec": Call(builtins.exec, code),
        "builtins.open": Call(open, str(flag), "w"),
        "shutil.rmtree": Call(shutil.rmtree, str(flag.parent)),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "nested": {"a": [({"b": (Call(posix.system, touch),)},)]},
        "key": {Call(posix.system, touch): 1},
    }
    out = {f"{n} {p}": pickle.dumps(x, p) for n, x in call.items() for p in (0, 1, 2, 4, 5)}
    system = b"cposix\nsystem\n"
    argument = text(touch)
    out |= {
        "reduce in a dict": pickled(a=system + b"(" + argument + b"tR"),
        "as hooks": pickled(a=tensor(hooks=system + b"(" + argument + b"tR")),
        "as storage": pickled(a=tensor(at=system + b"(" + argument + b"tR")),
        "as shape": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\0"
        + system + argument + b"\x85R" + numbers((1,)) + b"\x89}tR.",
        "in a persistent id": b"\x80\x02" + system + argument + b"\x85RQ.",
        "in a text persistent id": b"\x80\x02Pposix.system\n.",
        "inst": b"(" + argument + b"iposix\nsystem\n.",
        "obj": b"(" + system + argument + b"o.",
        "newobj": system + argument + b"\x85\x81.",
        "newobj_ex": system + argument + b"\x85}\x92.",
        "stack_global": b"\x80\x04" + text("posix") + text("system") + b"\x93" + argument
        + b"\x85R.",
        "dotted": b"\x80\x04" + text("torch._utils")
        + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
        "global of a global": b"\x80\x04" + system + text("x") + b"\x93.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("x") + system + b"sb.",
        "build an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "setstate": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + system + b"tb.",
        "ext1": b"\x80\x02\x82\x01.", "ext2": b"\x80\x02\x83\1\1.",
        "ext4": b"\x80\x02\x84\1\1\1\1.",
        "long4": b"\x80\x02\x8b\xff\xff\xff\x7f.", "long4 < 0": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "long1": b"\x80\x02\x8a\xff.", "binunicode": b"\x80\x02X\xff\xff\xff\xff.",
        "binunicode8": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        "binbytes": b"\x80\x03B\xff\xff\xff\xff.",
        "binbytes8": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        "bytearray8": b"\x80\x05\x96" + b"\xff" * 8 + b".", "binstring": b"T\xff\xff\xff\xff.",
        "frame": b"\x80\x04\x95" + b"\xff" * 8 + b".", "next_buffer": b"\x80\x05\x97.",
        "long_binput": b"\x80\x02]r\xff\xff\xff\xff.", "put": b"]p99999999999999999999\n.",
        "get": b"g1\n.", "pop": b"0.", "pop_mark": b"1.", "dup": b"]2.", "mark": b"(.",
        "int": b"I" + b"9" * 10_000 + b"\n.", "long": b"L" + b"9" * 10_000 + b"L\n.",
        "float": b"Fnan\n.", "string": b"S'\\x'\n.", "unicode": b"V\\ud800\n.",
        "long numbers": pickled(a=tensor(offset=1 << 2000)),
        "list in itself": b"\x80\x02]q\0h\0a.",
        "dict in itself": b"\x80\x02}q\0" + text("a") + b"h\0s.",
        "cyclic hooks": pickled(a=tensor(hooks=b"}q\x07" + text("x") + b"h\x07s")),
        "deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep hooks": pickled(a=tensor(hooks=b"]" * 50_000 + b"a" * 49_999)),
        "deep dict": b"\x80\x02" + (b"}" + text("a")) * 50_000 + b"}" + b"s" * 50_000 + b".",
        "deep tuple as a key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\1s.",
        "many marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
        "many strings": b"\x80\x02" + text("x") * 200_000 + b".",
        "tuple of tuples": b"\x80\x02)" + b"\x94\x94\x86".join([b"h\0"] * 1000) + b".",
        "no opcodes": b"", "only a stop": b".", "zeros": bytes(1000), "ones": b"\xff" * 1000,
    }  # fmt: skip
    return out
