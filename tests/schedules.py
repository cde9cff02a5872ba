"""Advances a scheduler's sequences as an engine's step does, without a model."""

from server.engine.torch.scheduling.scheduler import Chunk, Scheduler


def step(schedule: Scheduler) -> list[Chunk]:
    """Schedule a step, count its chunks as computed, remove finished sequences; return chunks."""
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
