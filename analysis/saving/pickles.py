"""Read untrusted pickles as plain data: no name in a pickle is imported, and nothing is called.

A pickle is a program for a stack machine. Python's own machine looks names up and calls the objects it finds; this one
does neither. A name becomes a `Name`, and the result of a call, an instance or a state becomes an `Inert` that records
the request. Lists, tuples, dictionaries, texts and numbers are themselves. Reading is one loop without recursion; its
cost is bounded by the number of steps.
"""

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from io import SEEK_END, SEEK_SET, BufferedReader, BytesIO
from typing import IO, Any, ClassVar, cast

# Far more than a training state has; a pickle of this many empty lists takes a gigabyte and half a minute.
MOST_STEPS = 10_000_000
# Limit for an argument of unannounced length: a name, or a number in digits.
_LINE_BYTES = 2**20
# Calls of these make a dictionary, the type of a state_dict and of entries that training scripts keep beside it.
_DICTIONARIES = frozenset(
    ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict", "__builtin__.dict")
)
OpenFile = BufferedReader | BytesIO
_UNHASHED = (list, tuple, dict, bytearray)


class PickleError(ValueError):
    """The bytes are not a complete pickle, or exceed the number of steps."""


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A name in a pickle, such as `torch._utils._rebuild_tensor_v2`. It was not looked up."""

    text: str


@dataclass(eq=False, slots=True)
class Inert:
    """Stands for the result of a call, or for an instance, that the pickle requests; neither is made.

    Attributes:
        name: the function of the call, or the class of the instance.
        arguments: of the call.
        state: the state that the instance would have received.
        items: the items that would have been appended or added to it.
        entries: the entries that would have been set by key, as in a subclass of dict.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A key of a dictionary that is a list, a tuple or a dictionary; hashing these may take forever."""

    value: Any


@dataclass(frozen=True, eq=False, slots=True)
class Reference:
    """An object outside of the pickle, such as a tensor's storage, by its persistent id."""

    id: Any


def read_pickle(file: OpenFile, *, references: list[Reference] | None = None, most_steps: int = MOST_STEPS) -> Any:
    """Return the data of the pickle at the file's current position, and leave the file right after it.

    Args:
        file: seekable.
        references: receives every `Reference` of the pickle, anywhere in the data.
        most_steps: limit for opcodes and copied entries together.

    Returns:
        Numbers, texts, bytes, None, lists, tuples, dictionaries, `Name`, `Inert` and `Reference`. Sets are lists. An
        object that occurs in several places is one object here; a list or a dictionary may hold itself.

    Raises:
        PickleError: the pickle ends early, is damaged, or takes more steps.
    """
    machine = _Machine(most_steps, [] if references is None else references)
    try:
        with warnings.catch_warnings():
            # Warnings about backslashes in names, which pickletools takes for escapes.
            warnings.simplefilter("ignore", DeprecationWarning)
            for opcode, argument, _ in pickletools.genops(cast(IO[bytes], _Bounded(file))):
                machine.step(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise PickleError("it is not a complete pickle") from None
    return machine.result


class _Bounded:
    """A file that limits reads to its size, whatever length a pickle announces."""

    def __init__(self, file: OpenFile) -> None:
        place = file.tell()
        self._end = file.seek(0, SEEK_END)
        file.seek(place, SEEK_SET)
        self._file = file

    def read(self, n_bytes: int) -> bytes:
        """Read bytes; a number beyond the end of the file is an error."""
        if n_bytes > 8 and n_bytes > self._end - self._file.tell():
            raise PickleError(f"it announces {n_bytes} bytes and ends before them")
        return self._file.read(n_bytes)

    def readline(self) -> bytes:
        """Read a line of limited length."""
        return self._file.readline(_LINE_BYTES)


class _Machine:
    """The stack, and the effect of each opcode on it. The opcode names are those of `pickletools`."""

    def __init__(self, most_steps: int, references: list[Reference]) -> None:
        self._references = references
        self.result: Any = None
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._left = most_steps

    def step(self, name: str, argument: Any) -> None:
        """Apply one opcode."""
        self._spend(1)
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _KEPT:
            self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
        elif name in _FETCHED:
            self._stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME"):
            if name not in self._OPERATIONS:
                raise PickleError(f"it has the opcode {name}, which no file of weights has")
            self._OPERATIONS[name](self, argument)

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise PickleError("it takes more steps than any file of weights")

    # --- the stack ---

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _twice(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _stop(self, _: Any) -> None:
        self.result = self._stack.pop()

    # --- containers ---

    def _list(self, _: Any) -> None:
        found = self._since_mark()
        self._stack.append(found)

    def _tuple(self, _: Any) -> None:
        found = tuple(self._since_mark())
        self._stack.append(found)

    def _tuple_of(self, n: int) -> None:
        if len(self._stack) < n:
            raise PickleError("it takes from an empty stack")
        self._stack[-n:] = [tuple(self._stack[-n:])]

    def _dict(self, _: Any) -> None:
        found = _pairs(self._since_mark())
        self._stack.append(found)

    def _append(self, _: Any) -> None:
        self._add([self._stack.pop()])

    def _extend(self, _: Any) -> None:
        self._add(self._since_mark())

    def _add(self, items: list[Any]) -> None:
        match self._stack[-1]:
            case list() as target:
                target.extend(items)
            case Inert() as target:
                target.items.extend(items)
            case other:
                raise PickleError(f"it appends to a {type(other).__name__}")

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, flat: list[Any]) -> None:
        match self._stack[-1]:
            case dict() as target:
                target.update(_pairs(flat))
            case Inert() as target:
                target.entries.update(_pairs(flat))
            case other:
                raise PickleError(f"it sets a member of a {type(other).__name__}")

    # --- names and calls that Python would import and run ---

    def _global(self, argument: str) -> None:
        self._stack.append(Name(argument.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleError("it has a name that is not text")
        self._stack.append(Name(f"{module}.{name}"))

    def _extension(self, code: int) -> None:
        self._stack.append(Name(f"extension {code}"))

    def _call(self, _: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        self._stack.append(self._made(called, arguments))

    def _call_with_names(self, _: Any) -> None:
        self._stack.pop()
        self._call(None)

    def _call_since_mark(self, _: Any) -> None:
        called, *arguments = self._since_mark()
        self._stack.append(self._made(called, tuple(arguments)))

    def _instance(self, argument: str) -> None:
        arguments = tuple(self._since_mark())
        self._stack.append(self._made(Name(argument.replace(" ", ".", 1)), arguments))

    def _made(self, called: Any, arguments: Any) -> Any:
        name = called.text if isinstance(called, Name) else f"a call of what {_word(called)} gives"
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        if name not in _DICTIONARIES:
            return Inert(name, arguments)
        match arguments:
            case (dict() as entries,):
                self._spend(len(entries))
                return dict(entries)
            case (list() | tuple() as pairs,):
                self._spend(len(pairs))
                if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
                    return _pairs([member for pair in pairs for member in pair])
        return {}

    def _state(self, _: Any) -> None:
        state = self._stack.pop()
        # Attributes of a dictionary or a tensor are not entries.
        if isinstance(target := self._stack[-1], Inert):
            target.state = state

    def _persistent(self, id_: Any) -> None:
        self._references.append(Reference(id_))
        match id_:
            case ("module", Name() as class_, *_):  # a network's class, with its source beside it
                self._stack.append(class_)
            case _:
                self._stack.append(self._references[-1])

    def _persistent_from_stack(self, _: Any) -> None:
        self._persistent(self._stack.pop())

    _OPERATIONS: ClassVar[dict[str, Callable[["_Machine", Any], None]]] = {
        "MARK": _mark, "POP": _pop, "POP_MARK": _pop_mark, "DUP": _twice, "STOP": _stop,
        "LIST": _list, "FROZENSET": _list, "TUPLE": _tuple, "DICT": _dict,
        "TUPLE1": lambda self, _: self._tuple_of(1),
        "TUPLE2": lambda self, _: self._tuple_of(2),
        "TUPLE3": lambda self, _: self._tuple_of(3),
        "APPEND": _append, "APPENDS": _extend, "ADDITEMS": _extend, "SETITEM": _set_item, "SETITEMS": _set_items,
        "GLOBAL": _global, "STACK_GLOBAL": _stack_global, "INST": _instance, "OBJ": _call_since_mark,
        "EXT1": _extension, "EXT2": _extension, "EXT4": _extension,
        "REDUCE": _call, "NEWOBJ": _call, "NEWOBJ_EX": _call_with_names, "BUILD": _state,
        "PERSID": _persistent, "BINPERSID": _persistent_from_stack,
    }  # fmt: skip


_VALUES = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
        "BINUNICODE", "BINUNICODE8",
    )
)  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict,
}  # fmt: skip
_KEPT = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_FETCHED = frozenset(("GET", "BINGET", "LONG_BINGET"))


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    """Return alternating keys and values as a dictionary."""
    if len(flat) % 2:
        raise PickleError("it has a key without a value")
    keys = (Key(key) if isinstance(key, _UNHASHED) else key for key in flat[::2])
    return dict(zip(keys, flat[1::2], strict=True))


def _word(value: Any) -> str:
    return value.name if isinstance(value, Inert) else f"a {type(value).__name__}"
