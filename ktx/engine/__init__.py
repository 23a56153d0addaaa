"""The engine: scheduler, model runner, sampler and speculative decoding."""
