"""Pickles as data: plain containers, tensors, and an inert record of everything else.

A pickle is a program for a stack machine. Python's own machine imports what the program names and
calls what it finds there, which is how a file runs code. The one below has no way to do either: a
name in the file is a string here, and where the file wants an object made, a `Placeholder` notes
what it wanted.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Opcodes that push a value: the one they carry, a constant, or an empty container.
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_NOTHING_TO_DO = {"PROTO", "FRAME", "STOP"}

# Containers that files of Python 2 and 3 make by a call.
_CONTAINERS: dict[str, type] = {
    "collections.OrderedDict": dict,
    "torch.Size": tuple,
} | {
    f"{module}.{kind.__name__}": kind
    for module in ("builtins", "__builtin__")
    for kind in (dict, list, set, frozenset, tuple)
}


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a file names. It is not looked up."""

    name: str


@dataclass(slots=True, eq=False, repr=False)
class Placeholder:
    """Stands where a file has an object of a class that is not admitted.

    Attributes:
        made_by: what the file calls for it, a `Name` or another placeholder.
        arguments: of that call.
        state: what the file would have set on the object.
        contents: what the file would have added to it: items, or (key, value) pairs.
    """

    made_by: "Name | Placeholder"
    arguments: tuple
    state: Any = None
    contents: list = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.made_by.name

    def __repr__(self) -> str:  # the fields may refer to each other in circles
        return f"<inert {self.made_by.name if isinstance(self.made_by, Name) else 'object'}>"


class SafePickleReader:
    """The stack machine, for one pickle.

    Args:
        makers: by name, functions that make the objects which are admitted besides containers;
            they are given the file's arguments and must not trust them.
        persistent_load: makes an object of a persistent id.
    """

    def __init__(
        self,
        *,
        makers: dict[str, Callable[..., Any]],
        persistent_load: Callable[[Any], Any],
    ):
        self.makers = makers
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.copies_left = 0
        self.actions: dict[str, Callable[[Any], None]] = {
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "POP": self._discard,
            "POP_MARK": lambda _: self._pop_to_mark(),
            "DUP": lambda _: self.stack.append(self.stack[-1]),
            "MEMOIZE": lambda _: self.memo.__setitem__(len(self.memo), self.stack[-1]),
            "TUPLE": lambda _: self.stack.append(tuple(self._pop_to_mark())),
            "LIST": lambda _: self.stack.append(self._pop_to_mark()),
            "DICT": lambda _: self.stack.append(_mapping(self._pop_to_mark())),
            "FROZENSET": lambda _: self.stack.append(frozenset(map(_key, self._pop_to_mark()))),
            "APPEND": lambda _: self._extend([self._pop()]),
            "APPENDS": lambda _: self._extend(self._pop_to_mark()),
            "ADDITEMS": lambda _: self._extend(self._pop_to_mark()),
            "SETITEM": lambda _: self._update(self._pop_many(2)),
            "SETITEMS": lambda _: self._update(self._pop_to_mark()),
            "GLOBAL": lambda name: self.stack.append(Name(name.replace(" ", "."))),
            "STACK_GLOBAL": lambda _: self.stack.append(Name(".".join(self._pop_many(2)))),
            "PERSID": lambda name: self.stack.append(self.persistent_load(name)),
            "BINPERSID": lambda _: self.stack.append(self.persistent_load(self._pop())),
            "REDUCE": lambda _: self._make(*self._pop_many(2)),
            "NEWOBJ": lambda _: self._make(*self._pop_many(2)),
            "NEWOBJ_EX": self._make_with_keywords,
            "INST": lambda name: self._make(
                Name(name.replace(" ", ".")), tuple(self._pop_to_mark())
            ),
            "OBJ": self._make_from_mark,
            "BUILD": self._set_state,
        }

    def load(self, data: bytes) -> Any:
        """The object that a pickle describes.

        Raises:
            ValueError: if the bytes are no whole pickle, or use what no checkpoint needs.
        """
        # An honest file names an element before a container is made of it.
        self.copies_left = len(data)
        try:
            for opcode, argument, position in pickletools.genops(data):
                self._step(opcode.name, argument, position)
            (result,) = self.stack
        except (IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"damaged pickle: {type(error).__name__} {error}") from error
        return result

    def _step(self, name: str, argument: Any, position: int) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _PUT:
            self.memo[argument] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[argument])
        elif name in self.actions:
            self.actions[name](argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop_many(_TUPLES[name])))
        elif name not in _NOTHING_TO_DO:
            raise ValueError(f"pickle opcode {name} at byte {position} is not admitted")

    # --- the stack -------------------------------------------------------------------------------

    def _pop_many(self, count: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < floor:
            raise IndexError("the stack is empty")
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def _pop(self) -> Any:
        return self._pop_many(1)[0]

    def _pop_to_mark(self) -> list[Any]:
        height = self.marks.pop()
        popped = self.stack[height:]
        del self.stack[height:]
        return popped

    def _discard(self, _argument: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self._pop()

    # --- containers ------------------------------------------------------------------------------

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.contents.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        else:
            raise TypeError(f"{type(target).__name__} cannot grow")

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.contents.extend(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, dict):
            target.update(_mapping(items))
        else:
            raise TypeError(f"{type(target).__name__} has no keys")

    # --- objects ---------------------------------------------------------------------------------

    def _make(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Name | Placeholder) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no name")
        name = function.name if isinstance(function, Name) else None
        if name == "collections.defaultdict":
            made: Any = {}  # its items follow; the factory is not kept
        elif name in _CONTAINERS and all(type(items) in (list, tuple) for items in arguments):
            made = self._container(_CONTAINERS[name], *arguments)
        elif name in self.makers:
            made = self.makers[name](*arguments)
        else:
            made = Placeholder(function, arguments)
        self.stack.append(made)

    def _container(self, kind: type, items: list | tuple = ()) -> Any:
        self.copies_left -= len(items)
        if self.copies_left < 0:
            raise ValueError("the pickle copies one container over and over")
        if kind is dict:
            return {_key(key): value for key, value in items}
        return kind(map(_key, items)) if kind in (set, frozenset) else kind(items)

    def _make_with_keywords(self, _argument: Any) -> None:
        function, arguments, keywords = self._pop_many(3)
        self._make(function, (*arguments, keywords) if keywords else arguments)

    def _make_from_mark(self, _argument: Any) -> None:
        function, *arguments = self._pop_to_mark()
        self._make(function, tuple(arguments))

    def _set_state(self, _argument: Any) -> None:
        state = self._pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):  # attributes of an OrderedDict are not kept
            raise TypeError(f"a state for a {type(self.stack[-1]).__name__}")


def _mapping(items: list[Any]) -> dict[Any, Any]:
    """A dictionary of alternating keys and values."""
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _key(key: Any) -> Any:
    """A key whose hash takes no recursion, which a deeply nested one would crash the process by."""
    parts = key if isinstance(key, tuple) else (key,)
    if all(
        part is None or isinstance(part, str | int | float | bytes | Name | Placeholder)
        for part in parts
    ):
        return key
    raise TypeError("a key that is not plain")
