"""Every interleaving of the ranks of a small order, each action by its meaning alone: the verifier's oracle."""


class Machine:
    """All ranks at their places; what is known follows from the places."""

    def __init__(self, order, placement, edges):
        self.order, self.placement, self.edges = order, placement, edges

    def after(self, places):
        """(what has been computed, posted messages by channel end) once each rank has done its first actions."""
        made, ends = set(), {}
        for rank, place in places.items():
            for action in self.order[rank][:place]:
                for stage, kind, microbatch, _ in action.sub_actions or (action,):
                    self._make(made, ends, stage, kind.value, microbatch)
        return made, ends

    def _make(self, made, ends, stage, kind, microbatch):
        if kind in "FIWB":
            made.add((kind, stage, microbatch))
            return
        for edge in self.remote_edges(stage, kind):
            ends.setdefault((edge, kind), []).append(microbatch)

    def remote_edges(self, stage, kind):
        source = kind in ("SEND_F", "RECV_B")
        return [
            edge for edge in self.edges
            if (edge.source if source else edge.destination) == stage
            and self.placement[edge.source] != self.placement[edge.destination]
        ]  # fmt: skip

    def arrived(self, ends, edge, way, microbatch):
        """Whether both ends have come to the message: without buffers the shorter end decides."""
        sent, received = ends.get((edge, f"SEND_{way}"), []), ends.get((edge, f"RECV_{way}"), [])
        return microbatch in sent[: min(len(sent), len(received))]

    def can_run(self, action, made, ends, with_messages):
        made = set(made)
        for part in action.sub_actions or (action,):
            if not self._part_can_run(part, made, ends, with_messages):
                return False
            made.add((part.computation_type.value, part.stage_index, part.microbatch_index))
        return True

    def _part_can_run(self, part, made, ends, with_messages):
        stage, kind, microbatch = part.stage_index, part.computation_type.value, part.microbatch_index
        has_backward = ("B", stage, microbatch) in made or ("I", stage, microbatch) in made
        if kind == "SEND_F":
            return ("F", stage, microbatch) in made
        if kind == "SEND_B":
            return has_backward
        if kind in ("RECV_F", "RECV_B"):
            return True
        if (kind, stage, microbatch) in made:
            return False
        if kind == "W":
            return ("I", stage, microbatch) in made
        if kind != "F" and (("F", stage, microbatch) not in made or has_backward):
            return False
        for edge in self.edges:
            here, there = (edge.destination, edge.source) if kind == "F" else (edge.source, edge.destination)
            if here != stage:
                continue
            if with_messages and self.placement[here] != self.placement[there]:
                if not self.arrived(ends, edge, "F" if kind == "F" else "B", microbatch):
                    return False
            elif not any((k, there, microbatch) in made for k in ("F" if kind == "F" else "BI")):
                return False
        return True


def simulate_exhaustively(order, placement, microbatches, edges, with_messages):
    """Whether every interleaving comes to the end with everything done once."""
    wanted = []
    for stage in range(len(placement)):
        for microbatch in range(microbatches):
            wanted.append((stage, "F", microbatch))
            wanted += [(stage, "IW"[half], microbatch) for half in (0, 1)]
    found = []
    for rank, actions in order.items():
        for action in actions:
            for stage, kind, microbatch, _ in action.sub_actions or (action,):
                if stage >= len(placement) or placement[stage] != rank:
                    return False
                found += [(stage, k, microbatch) for k in ("IW" if kind == "B" else (kind.value,))]
    machine = Machine(order, placement, edges)
    if with_messages:
        for stage in range(len(placement)):
            for kind in ("SEND_F", "RECV_F", "SEND_B", "RECV_B"):
                if machine.remote_edges(stage, kind):
                    wanted += [(stage, kind, microbatch) for microbatch in range(microbatches)]
    if sorted(wanted) != sorted(found):
        return False
    end = {rank: len(actions) for rank, actions in order.items()}
    if with_messages:
        ends = machine.after(end)[1]
        if any(ends[edge, kind] != ends[edge, kind.replace("SEND", "RECV")] for edge, kind in ends if "SEND" in kind):
            return False
    todo, seen = [dict.fromkeys(order, 0)], set()
    while todo:
        places = todo.pop()
        if tuple(places.values()) in seen:
            continue
        seen.add(tuple(places.values()))
        made, ends = machine.after(places)
        steps = [
            {**places, rank: place + 1} for rank, place in places.items()
            if place < end[rank] and machine.can_run(order[rank][place], made, ends, with_messages)
        ]  # fmt: skip
        if not steps and places != end:
            return False
        todo += steps
    return True
