"""Sample text from a GPT: the prompt in one pass, then token by token through a cache.

On CUDA the step of a token, sampling included, is one replay of a CUDA graph."""

from collections.abc import Callable
from contextlib import nullcontext
from numbers import Integral

import torch
from torch import Tensor

from ..kernels.derived import passing_captures
from .fused import Fused, fits
from .graphs import Aside, CudaGraph
from .held import Held
from .model import GPT, Cache

CACHE_MULTIPLE = 64  # positions: attention on CUDA copies masks whose rows are not aligned
COLDEST = 1e-30  # as good as 0: logits over less are beyond float32, and then NaN
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

    The model sees the last block_size tokens, without dropout. temperature 0 takes the most likely
    token; `top_k` keeps the k most likely ones. `advance` is called after each token. ValueError
    for settings out of range, and for an idx that is not one of the model's tokens, where it is.
    """
    check_sampling(1 if count == 0 else count, temperature, top_k)
    _check_prompt(model, idx)
    if count == 0:
        return idx.clone()
    modes = [(part, part.training) for part in model.modules()]
    try:
        with passing_captures():  # a model may be trained on after a sample
            decoder = Decoder(model, idx, count, temperature, top_k, seed)
            decoder.start()
            advance()
            for _ in range(count - 1):
                decoder.step()
                advance()
            return decoder.tokens
    finally:
        for part, is_training in modes:
            part.training = is_training


def check_sampling(count: int, temperature: float, top_k: int) -> None:
    """ValueError unless count and top_k are 1 or more, and temperature is 0 or more."""
    for name, value in (("count", count), ("top_k", top_k)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}: expected a whole number, 1 or more, got {value!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature!r}")


def _check_prompt(model: GPT, idx: Tensor) -> None:
    device, vocabulary = model.wte.weight.device, model.config.vocab_size
    if idx.ndim != 2 or idx.dtype != torch.int64 or 0 in idx.shape:
        raise ValueError(
            "idx: expected int64 [B, T], at least one text and one token to start from, got "
            f"{idx.dtype} {list(idx.shape)}"
        )
    if idx.device != device:
        raise ValueError(f"idx: expected tokens on {device}, as the model is, got {idx.device}")
    least, most = (int(end) for end in idx.aminmax())
    if least < 0 or most >= vocabulary:  # on a GPU it would end the process's use of it
        raise ValueError(f"idx: expected tokens from 0 to {vocabulary - 1}, got {least} to {most}")


class Decoder:
    """`tokens` int64 [B, T + count]: the prompt [B, T], then what start() and step() have sampled.

    start() reads the prompt and samples the first token; each step() samples the next one, without
    a look from the host. start() again begins anew, with what then stands in tokens[:, :T].

    start() takes the model as it then is, in eval mode: where it was written to, cast or packed
    since, cache and graphs are made anew. Until then steps on CUDA may go on with the old weights.

    The cache serves up to block_size tokens. Beyond, the window slides and every token in it gets
    another position, to which its key and value belong: each step then reads the window anew.

    `stepper` may be another form of the same model, for the steps alone. `captures_prompt`: on CUDA
    start(), too, is one replay, which is worth its capture where it is called more than once.
    `cache`: one that others, too, read their prompts into, with room for all tokens or block_size.
    `fuses`: a model that fused.py fits takes its way. Errors are those of generate().
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
        check_sampling(count, temperature, top_k)
        _check_prompt(model, prompt)
        batch, self._prompt_length = prompt.shape
        self.tokens = torch.cat([prompt, prompt.new_zeros(batch, count)], dim=1)
        self._position = prompt.new_zeros(1)  # of the last of them, where the graph can read it
        self._models = [model, *([stepper] if stepper else [])]
        self._fuses, self._captures_prompt = fuses, captures_prompt
        self._temperature, self._top_k, self._seed = temperature, top_k, seed
        self._generator = torch.Generator(prompt.device)
        self._block_size = model.config.block_size
        self._given_cache = cache
        self._prepare()

    def _prepare(self) -> None:
        """Passes, cache and graphs for the model as it is."""
        self._length = 0  # tokens so far; 0 before start()
        model, stepper = self._models[0], self._models[-1]
        first, size = self._prompt_length, self.tokens.shape[1]
        window = min(size, self._block_size)
        _check_prompt(model, self.tokens[:, :first])
        self._graph = self._prompt_graph = None  # whose memory comes before that of new ones
        self._cache: Cache = None  # type: ignore[assignment]
        if self._given_cache is None:
            length = -(-window // CACHE_MULTIPLE) * CACHE_MULTIPLE
            self._cache = Cache(model, len(self.tokens), length)
        else:
            self._cache = self._given_cache
        for each in self._models:
            self._cache.check(each, len(self.tokens), window)
        for each in self._models:
            each.eval()
        self._held = Held(*self._models)
        self._of_prompt = pass_of(model, self._fuses)
        self._of_token = self._of_prompt if stepper is model else pass_of(stepper, self._fuses)
        if self.tokens.is_cuda and size > first + 1 and first < self._block_size:
            self._graph = self._capture(self._read_last)
        if self.tokens.is_cuda and self._captures_prompt and first <= self._block_size:
            self._prompt_graph = self._capture(self._read_prompt)

    @torch.no_grad()
    def start(self, reads_prompt: bool = True) -> None:
        """`reads_prompt`: or else the cache keeps what it holds, and the first token is 0: to time
        steps alone."""
        for model in self._models:
            if model.training:
                model.eval()
        is_replayed = reads_prompt and self._prompt_graph is not None
        if is_replayed:  # of memory that is held: the GPU reads on while the host looks
            self._begin(reads_prompt)
        if self._held.has_changed():
            self._prepare()
            is_replayed = False
        if not is_replayed:
            self._begin(reads_prompt)

    def _begin(self, reads_prompt: bool) -> None:
        self._length = self._prompt_length
        self._position.fill_(self._length - 1)
        self._generator.manual_seed(self._seed)
        if not reads_prompt:
            self.tokens[:, self._length] = 0
            self._length += 1
            self._position += 1
        elif self._prompt_graph:
            self._prompt_graph.replay()
            self._length += 1
        else:
            self._read_prompt()

    @torch.no_grad()
    def step(self) -> None:
        if self._length == 0:
            raise ValueError("step: expected start() before it")
        if self._length == self.tokens.shape[1]:
            raise ValueError(f"step: all {self._length} tokens are there")
        if self._length > self._block_size:
            self._read_window(self._length)
        elif self._graph:
            self._graph.replay()
            self._length += 1
        else:
            self._read_last()

    def _read_prompt(self) -> None:
        self._read_window(self._prompt_length)

    def _read_last(self) -> None:
        token = self.tokens.index_select(1, self._position)  # [B, 1]
        self._append(self._of_token(token, self._cache, self._position))

    def _read_window(self, end: int) -> None:
        """The last of so many tokens that the model sees, as of a prompt."""
        first = max(0, end - self._block_size)
        self._append(self._of_prompt(self.tokens[:, first:end], self._cache, None))

    def _append(self, logits: Tensor) -> None:  # [B, 1, V]
        self._position += 1
        self.tokens.index_copy_(1, self._position, self._sample(logits[:, -1]))
        self._length += 1

    def _sample(self, logits: Tensor) -> Tensor:  # [B, V] -> [B, 1]
        if self._temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        # Of 16 bits it takes half the time.
        best, choices = logits.topk(min(self._top_k, logits.shape[-1]), sorted=False)
        temperature = max(self._temperature, COLDEST)
        probabilities = torch.softmax(best.float() / temperature, dim=-1)
        # Of exponential variables with these rates the first is each with its probability.
        # torch.multinomial draws so too, but checks its input on the host.
        times = torch.empty_like(probabilities).exponential_(generator=self._generator)
        return choices.gather(1, (probabilities / times).argmax(dim=-1, keepdim=True))

    def _capture(self, read: Callable[[], None]) -> CudaGraph:
        # Weights that autocast has cast and kept would be gone when it ends.
        is_cast = torch.is_autocast_enabled("cuda")
        uncached = torch.autocast("cuda", cache_enabled=False) if is_cast else nullcontext()
        with uncached, torch.cuda.device(self.tokens.device):
            aside = Aside(self.tokens.device)
            with aside():
                for _ in range(WARM_UPS):
                    self._position.fill_(self._prompt_length - 1)
                    read()
            graph = CudaGraph(read, aside, generator=self._generator)
        self._length = 0
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
