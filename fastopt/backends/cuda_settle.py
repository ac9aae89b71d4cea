"""Kernels that decide what a step does, so that the host need not wait for the device.

One block adds up the norm of the gradients, decides whether the step is skipped, and
computes each row of scalars as the host would, in float64 with correctly rounded
powers. A rule that measures its segments has a second such kernel, for what follows
from its sums. Both write the rows that the update reads, and count the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt.backends import cuda_table
from fastopt.backends.cuda_accesses import (
    accesses,
    cuda,
    lookups,
    pointer_to,
    storing_entries,
)
from fastopt.backends.cuda_jobs import CONTROL, LIMITS, Settle
from fastopt.backends.cuda_kernels import finished
from fastopt.backends.cuda_scalars import device_scalars
from fastopt.backends.cuda_streams import indented
from fastopt.memory.order import CHUNK, SPAN

ARGUMENTS = (
    "table, segments, rows, grads, squares, sums, totals, hyper, steps, carry, "
    "numbers, measured, out, control, asked, found, scale, lr, counts, groups, "
    "spans, span_count, partials"
)
COUNT = len(ARGUMENTS.split(","))


def load(place: str, i: str) -> str:
    """Return the text that loads a float64."""
    return f"load_wide(pointer_to_wide({place}), {i})[0]"


def store(place: str, i: str, value: str) -> str:
    """Return the text that stores a float64."""
    return f"store_wide(pointer_to_wide({place}), {i}, ({value},))"


def settle_kernel(job: Settle) -> tuple[Callable[..., None], Any]:
    """Return the kernel, not yet compiled, and its signature. It takes the addresses of
    what ``cuda_decisions.Decisions`` allocates, and the numbers of segments and of
    rows. It has one block."""
    names: dict[str, Any] = {**lookups(), "cuda": cuda, "__name__": __name__}
    single, access = np.dtype(np.float32), accesses(1)
    names |= {"load_wide": access["load"], "store_wide": access["store"]}
    names |= {"pointer_to_wide": pointer_to(np.dtype(np.float64))}
    names |= {"pointer_to_number": pointer_to(job.dtype)}
    names |= {"pointer_to_single": pointer_to(single), "store_whole": storing_entries()}
    names |= {"sqrt": math.sqrt, "infinity": math.inf, "number": float}
    if job.scalars is not None:
        names["scalars"] = device_scalars(job.scalars)
    if job.settle is not None:
        names["settle"] = device_scalars(job.settle)
    lines = [f"def kernel({ARGUMENTS}):", "    thread = whole(cuda.threadIdx.x)"]
    if job.stage == "factor":
        lines += indented(["if thread == 0:", *indented(of_factor(job, "0"))])
        place = "store_wide(pointer_to_number(measured), 0, (factor,))"
        lines += indented(indented([place]))
        return marked(*finished(lines, names, COUNT))
    if job.norm and job.stage == "scalars":
        lines += indented(of_norm(job))
    elif job.stage == "scalars":
        lines += indented(without_norm(job))
    lines.append(f"    skip = entry(control, {CONTROL.index('skip')})")
    if job.stage == "scalars":
        lines += indented(of_scalars(job))
    else:
        lines += indented(of_sums(job))
    return marked(*finished(lines, names, COUNT))


def marked(kernel: Any, signature: Any) -> tuple[Callable[..., None], Any]:
    """Return a kernel whose threads wait for each other, which the simulator must
    know."""
    kernel.waits = True
    return kernel, signature


def of_factor(job: Settle, r: str) -> list[str]:
    """Return the lines that find the factor for the gradients, before it is shrunk."""
    lines = [f"factor = {load('hyper', f'{r} * {1 + job.hyper}')}"]
    if job.scale:
        place = "load_wide(pointer_to_single(scale), 0)[0]"
        lines.append(f"factor = factor * (1.0 / number({place}))")
    return lines


def of_norm(job: Settle) -> list[str]:
    """Return the lines that take the norm of all gradients."""
    lines = [
        *in_spans(job, "squares", 1),
        f"for s in range(thread, segments, {cuda_table.BLOCK}):",
        "    total = 0.0",
        "    if entry(grads, s) != 0:",
        *indented(indented(adding(job, "s", ["total"]))),
        f"    {store('totals', 's', 'total')}",
        "cuda.syncthreads()",
        "if thread == 0:",
        "    total = 0.0",
        "    for s in range(segments):",
        f"        total = total + {load('totals', 's')}",
        "    norm = sqrt(total)",
        "    shrink = 1.0",
        f"    limit = {load('asked', '0')}",
        "    if limit < infinity:",
        "        shrink = limit / (norm + 1e-6)",
        "        if shrink >= 1.0:",
        "            shrink = 1.0",
        f"    {store('control', str(CONTROL.index('norm')), 'norm')}",
        f"    {store('control', str(CONTROL.index('shrink')), 'shrink')}",
        "    skip = 0",
    ]
    if job.skips:
        lines += ["    if norm - norm != 0.0:", "        skip = 1"]
    return [*lines, *indented(deciding(job)), "cuda.syncthreads()"]


def without_norm(job: Settle) -> list[str]:
    """Return the lines that decide about the step where no norm is asked for."""
    return [
        "if thread == 0:",
        "    skip = 0",
        f"    {store('control', str(CONTROL.index('shrink')), '1.0')}",
        *indented(deciding(job)),
        "cuda.syncthreads()",
    ]


def deciding(job: Settle) -> list[str]:
    """Return the lines that note whether the step is skipped."""
    lines = ["more = skip"]  # a scaler's flag does not count
    if job.found:
        lines += [
            "if load_wide(pointer_to_single(found), 0)[0] != 0.0:",
            "    skip = 1",
            "    more = 0",
        ]
    place = CONTROL.index("skipped")
    return [
        *lines,
        f"store_whole(control, {CONTROL.index('skip')}, skip)",
        f"store_whole(control, {place}, entry(control, {place}) + more)",
    ]


AT_ONCE = 8  # sums that are loaded before they are added, because memory is far away


def in_spans(job: Settle, sums: str, terms: int) -> list[str]:
    """Return the lines that add up the chunks of each span."""
    lines = [
        f"for s in range(thread, span_count, {cuda_table.BLOCK}):",
        f"    at = entry(spans, s) * {job.stride}",
        "    if entry(grads, entry(spans, s)) != 0:",
        f"        size = entry(table, at + {cuda_table.SIZE})",
        f"        begin = entry(table, at + {cuda_table.FIRST_CHUNK})",
        f"        last = begin + (size + {CHUNK - 1}) // {CHUNK}",
        f"        first = (s - entry(table, at + {cuda_table.FIRST_SPAN})) * {SPAN}",
        f"        beyond = min(begin + first + {SPAN}, last)",
    ]
    for k in range(terms):
        body = ["total = 0.0", "chunk = begin + first"]
        body.append(f"while chunk + {AT_ONCE} <= beyond:")
        for j in range(AT_ONCE):
            body.append(f"    x{j} = {load(sums, f'(chunk + {j}) * {terms} + {k}')}")
        body += [f"    total = total + x{j}" for j in range(AT_ONCE)]
        body += [f"    chunk = chunk + {AT_ONCE}", "while chunk < beyond:"]
        body.append(f"    total = total + {load(sums, f'chunk * {terms} + {k}')}")
        body.append("    chunk = chunk + 1")
        body.append(store("partials", f"s * {terms} + {k}", "total"))
        lines += indented(indented(body))
    return [*lines, "cuda.syncthreads()"]


def adding(job: Settle, segment: str, totals: list[str]) -> list[str]:
    """Return the lines that add the spans of a segment to totals, in order."""
    at, terms = f"{segment} * {job.stride}", len(totals)
    size = f"entry(table, {at} + {cuda_table.SIZE})"
    lines = [
        f"span = entry(table, {at} + {cuda_table.FIRST_SPAN})",
        f"beyond = span + ({size} + {CHUNK * SPAN - 1}) // {CHUNK * SPAN}",
        "while span < beyond:",
    ]
    for k, total in enumerate(totals):
        place = f"span * {terms} + {k}"
        lines.append(f"    {total} = {total} + {load('partials', place)}")
    return [*lines, "    span = span + 1"]


def of_scalars(job: Settle) -> list[str]:
    """Return the lines that compute each row of scalars, and count the step."""
    row = 1 + job.hyper
    group = "entry(groups, r)" if job.counts else "r"
    lines = [f"for r in range(thread, rows, {cuda_table.BLOCK}):"]
    lines += indented(of_factor(job, group))
    shrink = load("control", str(CONTROL.index("shrink")))
    lines.append(f"    factor = factor * {shrink}")
    if job.scalars is None:  # the host has computed them, for a step that it knows
        lines.append(f"    t = whole({load('hyper', f'r * {row} + 1')})")
        lines.append("    store_whole(steps, r, t)")
    elif job.counts:
        lines += [
            "    t = whole(load_wide(pointer_to_single(counts), r)[0]) + 1",
            "    if (skip == 0) & (entry(grads, r) != 0):",
            "        store_whole(steps, r, t)",
            "        store_wide(pointer_to_single(counts), r, (t,))",
        ]
    else:
        lines.append("    t = entry(steps, r) + 1")
        lines += ["    if skip == 0:", "        store_whole(steps, r, t)"]
    given = []
    for k in range(job.carry):
        lines.append(f"    c{k} = number({load('carry', f'r * {job.carry} + {k}')})")
        given.append(f"c{k}")
    for k in range(job.hyper):
        value = load("hyper", f"{group} * {row} + {1 + k}")
        if k == job.lr_column:
            kind = "single" if job.lr_kind == "float32" else "wide"
            place = group if job.counts else "0"
            value = f"load_wide(pointer_to_{kind}(lr), {place})[0]"
        lines.append(f"    h{k} = number({value})")
        given.append(f"h{k}")
    if job.scalars is None:
        lines.append(f"    values = ({', '.join(given[1:])},)")
    else:
        lines.append(f"    values = scalars(t, {', '.join(given)})")
    used = [f"values[{k}]" for k in range(job.results)]
    if job.settle is None:
        lines += indented(row_out(job, used[: job.used]))
        lines += indented(carrying(job, used[len(used) - job.carry :]))
        return lines
    for k, value in enumerate(["factor", *used]):
        lines.append(f"    {store('numbers', f'r * {1 + job.results} + {k}', value)}")
    row_of_sums = 1 + job.measured + LIMITS * job.clip
    measured = ["factor", *used[: job.measured], *limits_of(job)]
    for k, value in enumerate(measured):
        place = f"r * {row_of_sums} + {k}"
        lines.append(
            f"    store_wide(pointer_to_number(measured), {place}, ({value},))"
        )
    return lines


def limits_of(job: Settle) -> list[str]:
    return [load("asked", str(1 + k)) for k in range(LIMITS * job.clip)]


def row_out(job: Settle, scalars: list[str]) -> list[str]:
    """Return the lines that store a row for the update."""
    values = ["factor", *scalars, *limits_of(job)]
    if job.average:
        values.append(load("asked", str(1 + LIMITS)))
    return [
        f"store_wide(pointer_to_number(out), r * {len(values)} + {k}, ({value},))"
        for k, value in enumerate(values)
    ]


def carrying(job: Settle, carry: list[str]) -> list[str]:
    """Return the lines that store what the rule carries, unless the step is skipped."""
    lines = [
        f"    {store('carry', f'r * {job.carry} + {k}', value)}"
        for k, value in enumerate(carry)
    ]
    return ["if skip == 0:", *lines] if lines else []


def of_sums(job: Settle) -> list[str]:
    """Return the lines that compute what follows from the sums of the rule."""
    terms = [f"term{k}" for k in range(job.terms)]
    lines = in_spans(job, "sums", job.terms)
    if job.over_all:
        lines += [
            f"for s in range(thread, segments, {cuda_table.BLOCK}):",
            *(f"    {term} = 0.0" for term in terms),
            "    if entry(grads, s) != 0:",
            *indented(indented(adding(job, "s", terms))),
        ]
        for k, term in enumerate(terms):
            lines.append(f"    {store('totals', f's * {job.terms} + {k}', term)}")
        lines.append("cuda.syncthreads()")
    lines.append(f"for r in range(thread, rows, {cuda_table.BLOCK}):")
    body = ["n = 0", *(f"{term} = 0.0" for term in terms)]
    size = f"entry(table, s * {job.stride} + {cuda_table.SIZE})"
    if job.over_all:
        body += [
            "for s in range(segments):",
            "    if entry(grads, s) != 0:",
            f"        n = n + {size}",
        ]
        for k, term in enumerate(terms):
            total = load("totals", f"s * {job.terms} + {k}")
            body.append(f"        {term} = {term} + {total}")
    else:
        body += ["s = r", "if entry(grads, s) != 0:", f"    n = {size}"]
        body += indented(adding(job, "s", terms))
    row = "0" if job.shared else f"r * {1 + job.results}"
    values = [f"value{k}" for k in range(job.results)]
    body.append(f"factor = {load('numbers', row)}")
    for k, value in enumerate(values):
        body.append(f"{value} = number({load('numbers', f'{row} + {1 + k}')})")
    direct = job.results - job.handed
    new = job.used - direct + job.carry
    results = [f"result{k}" for k in range(new)]
    given = ["number(n)", *(f"number({term})" for term in terms), *values[direct:]]
    body += [
        f"t = entry(steps, {'0' if job.shared else 'r'})",
        "if n > 0:",
        f"    {', '.join(results)}, = settle(t, {', '.join(given)})",
        "else:",
        *(f"    {result} = 0.0" for result in results[: new - job.carry]),
    ]
    for k in range(job.carry):
        old = load("carry", f"r * {job.carry} + {k}")
        body.append(f"    {results[new - job.carry + k]} = number({old})")
    scalars = [*values[:direct], *results[: new - job.carry]]
    if direct:
        body += ["if n == 0:", *(f"    {value} = 0.0" for value in values[:direct])]
    body += row_out(job, scalars)
    body += carrying(job, results[new - job.carry :])
    return [*lines, *indented(body)]
