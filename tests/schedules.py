"""What a step does to its sequences, without a model."""

from server.engine.torch.scheduling.scheduler import Chunk, Scheduler


def step(schedule: Scheduler) -> list[Chunk]:
    """One step's chunks, as if they were computed; sequences that finish are removed."""
    chunks = schedule.schedule().chunks
    sampling = [chunk.sequence for chunk in chunks if chunk.draws]
    for chunk in chunks:
        chunk.sequence.scored_prompt_tokens += len(chunk.scored_positions)
        chunk.sequence.computed_tokens += chunk.count
    for each in sampling:
        each.tokens.append(0)
        if len(each.tokens) == each.max_length:
            schedule.remove(each)
    schedule.check()
    return chunks
