"""From the raw DAG to the graph of the paper: merge weightless runs, partition the weights into blocks."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from quantdm.denoisers.names import weights_below
from quantdm.denoisers.trace import Op, Trace

MAX_HOPS = 4  # the surrogate has four message-passing layers
MAX_WEIGHTS = 8  # a block's assignments are enumerated


@dataclass(frozen=True)
class Group:
    """A block: its weights (ids of ops), the op whose in-neighbourhood within `hops` holds exactly them."""

    name: str
    weights: frozenset[int]
    root: int
    hops: int


class Dag:
    """The reduced DAG. Ids are those of the trace; `inputs` and `outputs` hold the live nodes only."""

    def __init__(self, trace: Trace) -> None:
        self.ops: list[Op] = list(trace.ops)
        self.kinds = {i: op.kinds for i, op in enumerate(self.ops)}
        self.inputs: dict[int, list[int]] = {i: list(op.inputs) for i, op in enumerate(self.ops)}
        self.outputs: dict[int, list[int]] = {i: [] for i in self.inputs}
        self.kept = trace.outputs
        self.into: dict[int, int] = {}  # a merged node -> the node that it is part of
        for i, sources in self.inputs.items():
            for source in sources:
                self.outputs[source].append(i)
        self._drop_dead()
        self._merge_runs()

    def is_weight(self, i: int) -> bool:
        """Say whether a node is a weight layer."""
        return self.ops[i].layer is not None

    def weights(self) -> dict[str, int]:
        """Return layer name -> node of every weight layer that the forward reached."""
        return {name: i for i in self.inputs if (name := self.ops[i].layer) is not None}

    def border(self, source: int) -> int:
        """Add a weightless node behind a weight: where its output is handed to the weights of other blocks."""
        self.ops.append(Op(None, self.ops[source].layer or "", ("border",)))
        node = len(self.ops) - 1
        self.kinds[node], self.inputs[node], self.outputs[node] = ("border",), [source], []
        self.outputs[source].append(node)
        return node

    def reconnect(self, i: int, old: int, new: Iterable[int]) -> None:
        """Replace the edge old -> i by edges from `new`."""
        self.inputs[i].remove(old)
        self.outputs[old].remove(i)
        for source in new:
            if source not in self.inputs[i]:
                self.inputs[i].append(source)
                self.outputs[source].append(i)

    def remove(self, i: int) -> None:
        """Remove a node with its edges."""
        for source in self.inputs.pop(i):
            self.outputs[source].remove(i)
        for target in self.outputs.pop(i):
            self.inputs[target].remove(i)

    def interior(self, i: int, members: AbstractSet[int]) -> bool:
        """Say whether a combine node only carries the outputs of one block's weights to other weights of it."""
        if self.is_weight(i) or i in self.kept:
            return False
        around = (*self.inputs[i], *self.outputs[i])
        return bool(self.inputs[i] and self.outputs[i]) and all(n in members for n in around)

    def _drop_dead(self) -> None:
        """Drop weightless operations that nothing reads."""
        for i in sorted(self.inputs, reverse=True):
            if not self.outputs[i] and not self.is_weight(i) and i not in self.kept:
                self.remove(i)

    def _merge_runs(self) -> None:
        """Merge each combine node that has one reader, itself a combine node of the same step, into that reader."""
        for i in sorted(self.inputs):
            if not self._merges(i):
                continue
            reader = self.outputs[i][0]
            self.kinds[reader] = tuple(dict.fromkeys((*self.kinds[i], *self.kinds[reader])))
            self.reconnect(reader, i, self.inputs[i])
            self.into[i] = reader
            self.remove(i)

    def _merges(self, i: int) -> bool:
        if self.is_weight(i) or i in self.kept or len(self.outputs[i]) != 1 or "product" in self.kinds[i]:
            return False
        reader = self.outputs[i][0]
        if self.is_weight(reader):
            return False
        # A norm goes with what it feeds. A sum or concatenation stays in its module: the residual sum that ends a
        # block is that block's last node, whatever the parent module does with it.
        return self.kinds[i][-1] == "norm" or _inside(self.ops[reader].path, self.ops[i].path)


def partition(dag: Dag, layers: Sequence[str]) -> list[Group]:
    """Partition the weights into blocks along the module tree, each closed under its root's in-neighbourhood.

    A module is a block if some root in it sees all its weights, and no other weight, within `hops` hops; else its
    children are tried, and what is left over is split by the largest closed neighbourhoods down to single weights
    (0 hops, always closed). So the property holds by construction.
    """
    nodes = dag.weights()
    members = {name: nodes[name] for name in layers if name in nodes}
    counts = weights_below(members)
    return list(_split(dag, "", members, counts)) if members else []


def settle_blocks(dag: Dag, groups: Iterable[Group]) -> None:
    """Turn what the closure test assumed into the graph: borders between blocks, plain edges inside them."""
    group_of = {w: g for g in groups for w in g.weights}
    for i in sorted(dag.inputs):
        if not dag.is_weight(i) and (reader := next(iter(dag.outputs[i]), None)) in group_of:
            members = group_of[reader].weights
            if dag.interior(i, members):
                for target in tuple(dag.outputs[i]):
                    dag.reconnect(target, i, dag.inputs[i])
                dag.remove(i)
    for source in sorted(group_of):
        crossing = [t for t in dag.outputs[source] if t in group_of and group_of[t] is not group_of[source]]
        if crossing:
            border = dag.border(source)
            for target in crossing:
                dag.reconnect(target, source, [border])


def _split(dag: Dag, path: str, members: dict[str, int], counts: Counter[str]) -> Iterator[Group]:
    if len(members) == 1:
        ((name, node),) = members.items()
        yield Group(name, frozenset((node,)), node, 0)
        return
    if len(members) <= MAX_WEIGHTS and not _holds_blocks(path, members, counts):
        group = _close(dag, path, frozenset(members.values()))
        if group is not None:
            yield group
            return
    children: dict[str, dict[str, int]] = {}
    for name, node in members.items():
        below = name[len(path) + 1 :] if path else name
        child = f"{path}.{below.split('.')[0]}" if path else below.split(".")[0]
        children.setdefault(child, {})[name] = node
    rest: dict[str, int] = {}
    for child, names in children.items():
        if len(names) > 1:
            yield from _split(dag, child, names, counts)
        else:
            rest |= names
    yield from _gather(dag, rest)


def _holds_blocks(path: str, names: Iterable[str], counts: Counter[str]) -> bool:
    """Say whether a numbered element below `path` holds several weights: repeated structure is a block of its own."""
    for name in names:
        parts = name.split(".")
        start = len(path.split(".")) if path else 0
        for k in range(start, len(parts)):
            if parts[k].isdigit() and counts[".".join(parts[: k + 1])] > 1:
                return True
    return False


def _gather(dag: Dag, names: dict[str, int]) -> Iterator[Group]:
    """Take the largest closed neighbourhood of one of the given weights, again and again; a tie goes to the first."""
    left = set(names.values())
    while left:
        best: Group | None = None
        for root in (n for n in names.values() if n in left):
            seen: set[int] = set()
            for hops, weights in enumerate(_rings(dag, root, left)):
                seen |= weights
                if not seen <= left or len(seen) > MAX_WEIGHTS:
                    break
                better = best is None or (len(seen), -hops) > (len(best.weights), -best.hops)
                if seen and better and _hops(dag, root, seen) == hops:
                    best = Group(dag.ops[root].layer or "", frozenset(seen), root, hops)
        assert best is not None
        yield best
        left -= best.weights


def _close(dag: Dag, path: str, weights: frozenset[int]) -> Group | None:
    """Return the block of a whole module, at the fewest hops, or None where no root sees exactly its weights."""
    found = [(hops, -root) for root in _roots(dag, path, weights) if (hops := _hops(dag, root, weights)) is not None]
    if not found:
        return None
    hops, root = min(found)
    return Group(path, weights, -root, hops)


def _roots(dag: Dag, path: str, weights: AbstractSet[int]) -> list[int]:
    """Return the possible roots: the weights themselves, and the combine nodes of this module that read them."""
    readers = {t for w in weights for t in dag.outputs[w] if not dag.is_weight(t) and _inside(dag.ops[t].path, path)}
    readers = {r for r in readers if not dag.interior(r, weights)}
    return sorted(weights) + sorted(readers)


def _hops(dag: Dag, root: int, weights: AbstractSet[int]) -> int | None:
    """Return the hops within which `root` sees exactly `weights`, or None."""
    seen: set[int] = set()
    for hops, ring in enumerate(_rings(dag, root, weights)):
        seen |= ring
        if not seen <= weights:
            return None
        if len(seen) == len(weights):
            return hops
    return None


def _rings(dag: Dag, root: int, members: AbstractSet[int]) -> Iterator[set[int]]:
    """Yield the weights at distance 0, 1, ... MAX_HOPS upstream of `root`, as `settle_blocks` will place them.

    An edge from weight to weight across the rim of `members` counts two hops (there will be a border node), and a
    combine node that only joins members counts none.
    """
    ring: set[int] = {root}
    late: set[int] = set()  # weights behind a border: one hop later
    seen = {root}
    for _ in range(MAX_HOPS + 1):
        yield {n for n in ring if dag.is_weight(n)}
        following, waiting = set(late), set()
        for node in ring:
            for source in _upstream(dag, node, members):
                crosses = dag.is_weight(node) and dag.is_weight(source) and not {node, source} <= members
                (waiting if crosses else following).add(source)
        ring = following - seen
        late = waiting - seen - ring
        seen |= ring


def _upstream(dag: Dag, node: int, members: AbstractSet[int]) -> Iterator[int]:
    for source in dag.inputs[node]:
        if dag.interior(source, members):
            yield from dag.inputs[source]
        else:
            yield source


def _inside(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")
