"""What a step costs, read from its jaxpr and from the program that XLA made of it for a TPU.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; here everything is
multiplied by the trips of the loops around it.
"""

import math
import re
from typing import NamedTuple

import jax.extend as jex

_TYPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations)=\{?((?:%[^,\s}]+,? ?)+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1  # what the compiler writes where its model of costs knows nothing
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def flops(jaxpr, taken: float = 1.0, kernels: bool = True) -> float:
    """FLOPs of the matrix products in a jaxpr, loops multiplied out, unused results left out.

    taken: how often a branch on a condition goes the last way (the true one), else the first.
    kernels: also count inside kernels, which then do all tiles of their grid, masked ones too.
    """
    total, used = 0.0, {id(v) for v in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if not (eqn.effects or used & {id(v) for v in eqn.outvars}):
            continue
        used |= {id(v) for v in eqn.invars}
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * summed * eqn.outvars[0].aval.size
        elif name == "pallas_call":
            tiles = math.prod(params["grid_mapping"].grid)
            total += tiles * flops(params["jaxpr"]) if kernels else 0.0
        else:
            inner = [flops(sub, taken, kernels) for sub in jex.core.jaxprs_in_params(params)]
            if name == "cond":
                total += taken * inner[-1] + (1 - taken) * inner[0]
            else:
                times = {"scan": "length", "shard_map": "mesh"}.get(name)
                many = params[times] if times else 1
                total += getattr(many, "size", many) * sum(inner)
    return total


class Traffic(NamedTuple):
    """Collectives of one kind: how often they run in a step, and bytes that each chip sends."""

    runs: float
    bytes: float


class Program(NamedTuple):
    """What one chip does in a step, by the compiler.

    cycles: its estimate for what it generates itself: no kernels, no sorts, no waiting for others.
    endless: loops whose number of trips could not be read, counted as one trip.
    unknown: instructions that the compiler has no estimate of, left out.
    """

    cycles: float
    traffic: dict[str, Traffic]
    endless: int
    unknown: int


def read(hlo: str) -> Program:
    """The costs of an optimised TPU program, from its text.

    Of a conditional the last branch counts (the true one: the usual case in this package).
    """
    bodies, entry = _computations(hlo)
    cycles, endless, unknown = 0.0, 0, 0
    seen: dict[tuple[str, str], tuple[float, float]] = {}  # runs, bytes of one
    todo = [(entry, 1.0, True)]
    while todo:
        name, times, scheduled = todo.pop()
        types = {m[1]: m[2] for m in map(_INSTRUCTION.match, bodies[name]) if m}
        for line in bodies[name]:
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            label, result, op, rest = found.groups()
            if scheduled and (estimate := _CYCLES.search(rest)):
                known = int(estimate[1]) < _NO_ESTIMATE
                cycles += times * int(estimate[1]) if known else 0.0
                unknown += not known
            kind = op.removesuffix("-start")
            if kind in _COLLECTIVES:
                operands = [types.get(x, "") for x in re.findall(r"%([\w.-]+)", rest.split(")")[0])]
                size = _sent(kind, op != kind, result, sum(map(_size, operands)))
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind, size = "reduce-scatter", size / 2
                # A gather that goes on beside a loop appears inside it, too, on the same channel.
                channel = re.search(r"channel_id=(\d+)", rest)
                once = kind, channel[1] if channel else f"{name} {label}"
                seen[once] = min(seen.get(once, (math.inf, 0.0)), (times, size))
            called = {m[1]: re.findall(r"%([^,\s}]+)", m[2]) for m in _CALLED.finditer(rest)}
            if op == "while":
                trips = _trips(bodies, called["condition"][0])
                endless += trips is None
                todo.append((called["body"][0], times * (trips or 1), scheduled))
            elif op == "conditional":
                todo.append((called["branch_computations"][-1], times, scheduled))
            elif op == "call" or op.endswith("-start"):
                todo += [
                    (c, times, scheduled) for c in called.get("to_apply", called.get("calls", []))
                ]
            elif op == "fusion":  # its estimate stands on its own line; a collective may be inside
                todo += [(c, times, False) for c in called["calls"]]
    traffic: dict[str, Traffic] = {}
    for (kind, _), (times, size) in seen.items():
        before = traffic.get(kind, Traffic(0.0, 0.0))
        traffic[kind] = Traffic(before.runs + times, before.bytes + times * size)
    return Program(cycles, traffic, endless, unknown)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, by name, and the name of the first one to run."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _trips(bodies: dict[str, list[str]], condition: str) -> int | None:
    """Trips of a loop that counts from 0 in ones: what its condition compares with."""
    text = "\n".join(bodies[condition])
    limits = re.findall(r"[us]32\[\]\S* constant\((\d+)\)", text)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in text else None


def _size(types: str) -> float:
    """Bytes of all arrays in a type."""
    total = 0.0
    for name, bits, dims in _TYPE.findall(types):
        bytes_each = 1 if name == "pred" else int(bits) / 8
        total += bytes_each * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _sent(kind: str, started: bool, result: str, operands: float) -> float:
    """Bytes that one chip sends, where a ring does it and there are many chips."""
    if kind == "all-gather":  # a started one has its operands in its result
        return _size(result) - (2 if started else 1) * operands
    return 2 * operands if kind == "all-reduce" else operands
