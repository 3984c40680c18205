"""Sample text from a GPT: the prompt in one pass, then token by token through a cache.

On CUDA the step of a token, sampling included, is one replay of a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.derived import passing_captures
from .fused import Fused, fits
from .model import GPT, Cache

CACHE_MULTIPLE = 64  # positions: attention on CUDA copies masks whose rows are not aligned
WARM_UPS = 2  # passes before a capture: libraries allocate and kernels compile in the first ones

# Logits [B, 1, V] of the last of tokens [B, T]: of one at a position [1], or else of those from 0.
Pass = Callable[[Tensor, Cache, Tensor | None], Tensor]


def generate(
    model: GPT,
    idx: Tensor,
    count: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Append `count` sampled tokens to idx int64 [B, T] -> [B, T + count].

    The model sees the last block_size tokens. temperature 0 takes the most likely token;
    `top_k` keeps the k most likely ones. `advance` is called after each token.
    """
    if count == 0:
        return idx
    with passing_captures():  # a model may be trained on after a sample
        decoder = Decoder(model, idx, count, temperature, top_k, seed)
        decoder.start()
        advance()
        for _ in range(count - 1):
            decoder.step()
            advance()
        return decoder.tokens


class Decoder:
    """`tokens` int64 [B, T + count]: the prompt [B, T], then what start() and step() have sampled.

    start() reads the prompt and samples the first token; each step() samples the next one, without
    a look from the host. start() again begins anew, with the same tokens.

    The cache serves up to block_size tokens. Beyond, the window slides and every token in it gets
    another position, to which its key and value belong: each step then reads the window anew.

    `stepper` may be another form of the same model, for the steps alone. `captures_prompt`: on CUDA
    start(), too, is one replay, which is worth its capture where it is called more than once.
    `cache`: one that others, too, read their prompts into, with room for all tokens. `fuses`: a
    model that fused.py fits takes its way.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: GPT,
        prompt: Tensor,
        count: int,
        temperature: float = 0.8,
        top_k: int = 40,
        seed: int = 0,
        stepper: GPT | None = None,
        captures_prompt: bool = False,
        cache: Cache | None = None,
        fuses: bool = True,
    ) -> None:
        if count < 1 or not temperature >= 0 or top_k < 1 or prompt.shape[1] < 1:
            raise ValueError(
                "generate: expected count >= 1, temperature >= 0, top_k >= 1 and at least one "
                f"token to start from, got count {count}, temperature {temperature}, "
                f"top_k {top_k}, idx {list(prompt.shape)}"
            )
        batch, self._prompt_length = prompt.shape
        self.tokens = torch.cat([prompt, prompt.new_zeros(batch, count)], dim=1)
        self._length = self._prompt_length  # tokens so far
        self._position = prompt.new_zeros(1)  # of the last of them, where the graph can read it
        self._model = model.eval()
        self._of_prompt = pass_of(model, fuses)
        self._of_token = pass_of(stepper.eval(), fuses) if stepper else self._of_prompt
        self._temperature, self._top_k, self._seed = temperature, top_k, seed
        self._generator = torch.Generator(prompt.device)
        window = min(self.tokens.shape[1], model.config.block_size)
        length = -(-window // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self._cache = Cache(model, batch, length) if cache is None else cache
        is_cached = count > 1 and self._prompt_length < model.config.block_size
        self._graph = self._capture(self._read_last) if prompt.is_cuda and is_cached else None
        is_whole = captures_prompt and self._prompt_length <= model.config.block_size
        is_captured = prompt.is_cuda and is_whole
        self._prompt_graph = self._capture(self._read_prompt) if is_captured else None

    @torch.no_grad()
    def start(self, reads_prompt: bool = True) -> None:
        """`reads_prompt`: or else the cache keeps what it holds, and the first token is 0: to time
        steps alone."""
        self._length = self._prompt_length
        self._position.fill_(self._length - 1)
        self._generator.manual_seed(self._seed)
        if not reads_prompt:
            self._length += 1
            self._position += 1
        elif self._prompt_graph:
            self._prompt_graph.replay()
            self._length += 1
        elif self._length > self._model.config.block_size:
            self._read_window()
        else:
            self._read_prompt()

    @torch.no_grad()
    def step(self) -> None:
        if self._length == self.tokens.shape[1]:
            raise ValueError(f"step: all {self._length} tokens are there")
        if self._length > self._model.config.block_size:
            self._read_window()
        elif self._graph:
            self._graph.replay()
            self._length += 1
        else:
            self._read_last()

    def _read_prompt(self) -> None:
        prompt = self.tokens[:, : self._prompt_length]
        self._append(self._of_prompt(prompt, self._cache, None))

    def _read_last(self) -> None:
        token = self.tokens.index_select(1, self._position)  # [B, 1]
        self._append(self._of_token(token, self._cache, self._position))

    def _read_window(self) -> None:
        first = self._length - self._model.config.block_size
        self._append(self._model(self.tokens[:, first : self._length])[0])

    def _append(self, logits: Tensor) -> None:  # [B, T, V]
        self._position += 1
        self.tokens.index_copy_(1, self._position, self._sample(logits[:, -1]))
        self._length += 1

    def _sample(self, logits: Tensor) -> Tensor:  # [B, V] -> [B, 1]
        if self._temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        # Of 16 bits it takes half the time.
        best, choices = logits.topk(min(self._top_k, logits.shape[-1]), sorted=False)
        probabilities = torch.softmax(best.float() / self._temperature, dim=-1)
        # Of exponential variables with these rates the first is each with its probability.
        # torch.multinomial draws so too, but checks its input on the host.
        times = torch.empty_like(probabilities).exponential_(generator=self._generator)
        return choices.gather(1, (probabilities / times).argmax(dim=-1, keepdim=True))

    def _capture(self, read: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.device(self.tokens.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._position.fill_(self._prompt_length - 1)
                    read()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                read()
        return graph


def pass_of(model: GPT, fuses: bool = True) -> Pass:
    """How a model in eval mode reads tokens through a cache: by Fused, where it fits."""
    if fuses and fits(model):
        return Fused(model)

    def read(idx: Tensor, cache: Cache, position: Tensor | None) -> Tensor:
        if position is None:
            position = torch.arange(idx.shape[1], device=idx.device)
        return model(idx, cache=cache, position=position)[0]

    return read
