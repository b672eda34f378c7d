"""Faults that Triton's interpreter cannot show, because the compiler makes them, read from the compiled form.

The interpreter runs the program as it is written. These rules look at what became of it: at TTIR, in which every
operation still shows, and at TTGIR, which gives each tensor a layout over a block's threads. They need no GPU.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_NAME = re.compile(r"%[\w$.]+(?:#\d+)?")
_RESULT = re.compile(r"^(%[\w$.]+)(?::(\d+))? = ")
_VARIABLE = re.compile(r"(%[\w$.]+) = (%[\w$.#]+)")
_OPERATION = re.compile(r"\"?\b((?:tt|ttg|arith|scf|math|cf|gpu|nvvm|rocdl)\.[\w.]+)\"?")
_NARROW = re.compile(r" : (?:tensor<[\dx]+x)?i32\b")
_INTEGER = re.compile(r"arith\.constant (?:dense<)?(-?\d+)>? : (?:tensor<[\dx]+x)?i(?:32|64)\b")
_PRECISION = re.compile(r"inputPrecision = (\w+)")
_LAYOUT = re.compile(r"(#[\w.]+(?:<\{[^>]*\}>)?)>")
_BARRIERS = {"gpu.barrier", "ttg.barrier", "ttg.local_barrier", "nvvm.barrier0", "rocdl.barrier"}
_STORES = {"tt.store", "tt.atomic_rmw", "tt.atomic_cas"}


@dataclass(frozen=True)
class Operation:
    name: str
    text: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    path: tuple["Region", ...]  # the regions around it
    number: int  # of its line


@dataclass(frozen=True)
class Region:
    number: int
    branch: int  # 1 after an else
    loop: bool


class Program:
    """A module's text: its operations in their order, and of each value what it is computed from.

    The text uses names again once the region that they belong to has ended: here each value has a name of its own.
    """

    def __init__(self, text: str) -> None:
        self.operations: list[Operation] = []
        self.sources: dict[str, list[str]] = {}
        self.defined: dict[str, Operation] = {}
        self.arguments: list[str] = []
        regions: list[Region] = []
        scopes: list[dict[str, str]] = [{}]  # of each open region: what its names stand for
        carried: list[list[list[str]]] = [[]]  # and what its yields go to: the results, and a loop's variables
        for number, line in enumerate(map(str.strip, text.splitlines())):
            if line.startswith("}"):
                region = regions.pop()
                scopes.pop()
                targets = carried.pop()
                if line.endswith("{"):  # } else {
                    regions.append(Region(region.number, 1, False))
                    scopes.append({})
                    carried.append(targets)
                continue
            if "tt.func" in line:
                self.arguments = re.findall(r"(%[\w$.]+): !tt.ptr", line)
            found = None if line.startswith(("#", "module")) else _OPERATION.search(line)
            targets, variables = [], []
            if found:
                targets, variables = self._operation(found[1], line, number, regions, scopes, carried[-1])
            if line.endswith("{"):
                regions.append(Region(number, 0, bool(found) and found[1] in ("scf.for", "scf.while")))
                scopes.append(dict(variables))
                carried.append([targets, [unique for _, unique in variables]])

    def _operation(self, name, line, number, regions, scopes, targets):
        """Take in one operation; its results, and the names that a loop binds in its body."""

        def lookup(text: str) -> str:
            return next((scope[text] for scope in reversed(scopes) if text in scope), text)

        result = _RESULT.match(line)
        operands = tuple(map(lookup, _NAME.findall(line[result.end() :] if result else line)))
        names = _results(result)
        unique = tuple(f"{text}@{number}" for text in names)
        operation = Operation(name, line, unique, operands, tuple(regions), number)
        self.operations.append(operation)
        variables = []
        if name == "scf.yield":
            for group in targets:
                for target, source in zip(group, operands, strict=False):
                    self.sources.setdefault(target, []).append(source)
        elif name == "scf.for":
            variables.append((operands[0], f"{operands[0]}@{number}"))  # what it counts
            for k, (inner, start) in enumerate(_VARIABLE.findall(line.partition("iter_args(")[2].partition(") ->")[0])):
                variables.append((inner, f"{inner}@{number}"))
                for target in (f"{inner}@{number}", *unique[k : k + 1]):
                    self.sources.setdefault(target, []).append(lookup(start))
        else:
            for target in unique:
                self.sources[target] = list(operands)
        for text, target in zip(names, unique, strict=True):
            self.defined[target] = operation
            scopes[-1][text] = target
        return list(unique), variables

    def roots(self, pointer: str) -> set[str]:
        """The arguments that ``pointer`` may point into."""
        seen, left = set(), [pointer]
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                sources = self.sources.get(name, [])
                offset = name in self.defined and self.defined[name].name == "tt.addptr"
                left += sources[:1] if offset else sources
        return seen.intersection(self.arguments)

    def named(self, name: str) -> list[Operation]:
        return [operation for operation in self.operations if operation.name == name]


def _results(result: re.Match | None) -> list[str]:
    if result is None:
        return []
    return [f"{result[1]}#{k}" for k in range(int(result[2]))] if result[2] else [result[1]]


# ---- the rules ------------------------------------------------------------------------------------------------------


def faults(ttir: str, ttgir: str, precision: str | None = None, bounds: Mapping[str, int] | None = None) -> list[str]:
    """What is wrong with a kernel, a line each.

    Args:
        precision: what its products were asked to be computed in.
        bounds: the largest values of its integer arguments, by name, and of its program ids, ``x``, ``y`` and ``z``.
    """
    program, laid_out = Program(ttir), Program(ttgir)
    return [
        *_reordered(program),
        *_float_atomics(program),
        *_precisions(program, precision),
        *_read_after_store(program),
        *_overflows(program, bounds or {}),
        *_layouts_of_masks(laid_out),
    ]


def _reordered(program: Program) -> Iterator[str]:
    """A reshape that may permute its elements, beside another operand, whose elements then belong to others."""
    for reshape in program.named("tt.reshape"):
        if "allow_reorder" not in reshape.text:
            continue
        for user in program.operations:
            if reshape.results[0] in user.operands and not (user.name == "tt.histogram" and len(user.operands) == 1):
                yield f"a reshape that may reorder its elements feeds {user.name} with {len(user.operands)} operands"


def _float_atomics(program: Program) -> Iterator[str]:
    for atomic in program.named("tt.atomic_rmw"):
        if "fadd" in atomic.text:
            yield "floating-point numbers are added in their order of arrival"


def _precisions(program: Program, precision: str | None) -> Iterator[str]:
    for product in program.named("tt.dot"):
        found = _PRECISION.search(product.text)
        if found and found[1] not in ("ieee", precision):
            yield f"a product is computed in {found[1]}, and {precision or 'full precision'} was asked for"


def _read_after_store(program: Program) -> Iterator[str]:
    """What one warp stores another may not see before a barrier; the interpreter has one thread."""
    barriers = [k for k, operation in enumerate(program.operations) if operation.name in _BARRIERS]
    touched: dict[str, list[tuple[int, Operation]]] = {}
    for k, operation in enumerate(program.operations):
        if operation.name == "tt.load" or operation.name in _STORES:
            for root in program.roots(operation.operands[0]):
                touched.setdefault(root, []).append((k, operation))
    for root, events in touched.items():
        for at, store in events:
            for later, load in events:
                if store.name not in _STORES or load.name != "tt.load" or _exclusive(store, load):
                    continue
                between = range(at, later) if at < later else _loop(program, store, load)
                if len(between) and not any(barrier in between for barrier in barriers):
                    yield f"{root} is read where another warp has stored, with no barrier between"
                    break
            else:
                continue
            break


def _exclusive(x: Operation, y: Operation) -> bool:
    branches = {region.number: region.branch for region in x.path}
    return any(branches.get(region.number, region.branch) != region.branch for region in y.path)


def _loop(program: Program, store: Operation, load: Operation) -> range:
    """The operations of the innermost loop around both; empty without one."""
    loops = [region for region in store.path if region.loop and region in load.path]
    inside = [k for k, operation in enumerate(program.operations) if loops and loops[-1] in operation.path]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


Interval = tuple[int, int]
_GROWING = ("arith.addi", "arith.subi", "arith.muli", "arith.shli")
_SAME = ("arith.extsi", "arith.extui", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans")


def _overflows(program: Program, bounds: Mapping[str, int]) -> Iterator[str]:
    """Sums and products in 32 bits that do not fit, by interval arithmetic from what is known of the arguments."""
    known: dict[str, Interval] = {f"%{name}": (0, value) for name, value in bounds.items()}
    for k, operation in enumerate(program.operations):
        if operation.name == "scf.for":
            start, end = (known.get(x) for x in operation.operands[1:3])
            counter = f"{operation.operands[0]}@{operation.number}"
            if start and end:
                known[counter] = (start[0], max(start[0], end[1] - 1))
            continue
        following = program.operations[k + 1].name if k + 1 < len(program.operations) else ""
        value = _interval(operation, [known.get(x) for x in operation.operands], bounds, following)
        if value is None or not operation.results:
            continue
        narrow = operation.name in _GROWING and _NARROW.search(operation.text)
        if narrow and not -(2**31) <= value[0] <= value[1] < 2**31:
            yield f"a 32-bit integer becomes as large as {value[1]:.3g}: {operation.text.split(' loc')[0]}"
            continue
        known[operation.results[0]] = value


def _interval(operation: Operation, x: list, bounds: Mapping[str, int], following: str) -> Interval | None:
    name, text = operation.name, operation.text
    if name == "arith.constant":
        found = _INTEGER.search(text)
        return (int(found[1]), int(found[1])) if found else None
    if name == "tt.make_range":
        return 0, int(re.search(r"end = (\d+)", text)[1]) - 1
    if name in ("tt.get_program_id", "tt.get_num_programs"):
        axis = re.search(rf"{name} (\w)", text)[1]
        return (0, bounds[axis] + (name == "tt.get_num_programs")) if axis in bounds else None
    if name == "arith.select":
        x = x[1:]
    if name == "tt.reduce":
        x = x[:1] if following in ("arith.maxsi", "arith.minsi") else [None]
    if not x or any(interval is None for interval in x):
        return None
    if name in _SAME or name == "tt.reduce":
        return x[0]
    if name == "arith.select":
        return min(x[0][0], x[1][0]), max(x[0][1], x[1][1])
    if len(x) != 2:
        return None
    (a, b), (c, d) = x
    if name in ("arith.divsi", "arith.remsi", "arith.shli", "arith.shrsi") and (a < 0 or c < 0):
        return None
    return {
        "arith.addi": lambda: (a + c, b + d),
        "arith.subi": lambda: (a - d, b - c),
        "arith.muli": lambda: (min(a * c, a * d, b * c, b * d), max(a * c, a * d, b * c, b * d)),
        "arith.divsi": lambda: (a // max(1, d), b // max(1, c)),
        "arith.remsi": lambda: (0, min(b, max(0, d - 1))),
        "arith.shli": lambda: (a << c, b << min(d, 63)),
        "arith.shrsi": lambda: (a >> d, b >> c),
        "arith.minsi": lambda: (min(a, c), min(b, d)),
        "arith.maxsi": lambda: (max(a, c), max(b, d)),
    }.get(name, lambda: None)()


def _layouts_of_masks(program: Program) -> Iterator[str]:
    for histogram in program.named("tt.histogram"):
        if len(histogram.operands) < 2:
            continue
        data, mask = (_LAYOUT.findall(program.defined[x].text) for x in histogram.operands[:2])
        if data and mask and data[-1] != mask[-1]:
            yield f"a histogram's mask lies in {mask[-1]}, its data in {data[-1]}"
