"""Shards of one matrix, stepped together in one process."""


def step_together(partition, grads, states, shared, step, edges):
    """Directions of all shards, which exchange what the partition's collectives say, and nothing else."""
    running = [
        partition.step(grad, state, {} if index else shared, step, index, edges)
        for index, (grad, state) in enumerate(zip(grads, states))
    ]
    inbox, found = [None] * len(running), [None] * len(running)
    for collective in [*partition.collectives(edges, grads[0].dtype), None]:
        given = []
        for index, shard_step in enumerate(running):
            try:
                given.append(shard_step.send(inbox[index]))
            except StopIteration as stopped:
                found[index] = stopped.value
        if collective is None:
            break
        assert len(given) == len(running)
        for index, tensor in enumerate(given):
            assert tensor.dtype == collective.dtype
            assert tensor.shape == (
                collective.edges[-1] if collective.reduces else collective.rows(index),
                collective.width,
            )
        inbox = [
            collective.joined([collective.outgoing(tensor, index) for tensor in given]) for index in range(len(given))
        ]
        assert all(
            collective.arriving(index, source) == collective.outgoing(given[source], index).shape
            for index in range(len(given))
            for source in range(len(given))
        )
        sent = [sum(collective.outgoing(t, i).nbytes for i in range(len(given)) if i != j) for j, t in enumerate(given)]
        assert sent == [collective.sent_bytes(index) for index in range(len(given))]
    assert not any(direction is None for direction in found)
    return found
