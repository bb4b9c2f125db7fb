"""Slices of one matrix, stepped together in one process."""


def step_together(rule, grads, states, shared, step, info, edges):
    """Directions of all slices, which exchange what the rule's legs say, and nothing else."""
    running = [
        rule.slice_update(grad, state, {} if index else shared, step, info, index, edges)
        for index, (grad, state) in enumerate(zip(grads, states))
    ]
    inbox, found = [None] * len(running), [None] * len(running)
    for leg in [*rule.legs(info, edges, grads[0].dtype), None]:
        given = []
        for index, slice_step in enumerate(running):
            try:
                given.append(slice_step.send(inbox[index]))
            except StopIteration as stopped:
                found[index] = stopped.value
        if leg is None:
            break
        assert len(given) == len(running)
        for index, tensor in enumerate(given):
            assert tensor.shape == (leg.edges[-1] if leg.reduce else leg.rows(index), leg.width)
        inbox = [
            leg.joined([leg.outgoing(tensor, index) for tensor in given]).to(leg.dtype) for index in range(len(given))
        ]
        assert all(
            leg.arriving(index, source) == leg.outgoing(given[source], index).shape
            for index in range(len(given))
            for source in range(len(given))
        )
        sent = [sum(leg.outgoing(t, i).numel() for i in range(len(given)) if i != j) for j, t in enumerate(given)]
        assert sent == [leg.sent(index) for index in range(len(given))]
    assert not any(direction is None for direction in found)
    return found
