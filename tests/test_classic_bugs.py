"""
The bugs that preference-optimization code is known for, one test each.

Each docstring says the bug, where it was met in public, and what must hold here; CONTRIBUTING.md
shows them as a table. Beside each check stands the bug itself, written as a small replacement of
the code that is checked: `holds_only_without` shows that the check passes as the code is and fails
with the bug in its place. A check that cannot fail says nothing.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EOT,
    RAGGED,
    STAGES,
    V,
    lines,
    merging_encoding,
    one_batch,
    one_by_one,
    pack,
    perturb,
    rand,
    save,
    tiny_gpt,
)

import data
import exo
import model
import train
from data import Builder, Report
from infra import parallel
from model import GPT, GPTConfig, Scorer, Tree

BYTES = data.byte_encoding()
RAGGED = pack(RAGGED)
close = torch.testing.assert_close

# What the bugs below take the place of
forward, hidden, read_prompts, mlp = Scorer.forward, GPT.hidden, GPT.read_prompts, model.MLP.forward
collate, add, put, score = data.collate, Builder.add, Builder.put, parallel.score
ask_reference, update = train.Preference.ask_reference, train.update


def holds_only_without(check, *bugs: list) -> None:
    """The check holds, and fails with each bug: a list of (object, attribute, what is put
    there)."""
    check()
    for bug in bugs:
        with pytest.MonkeyPatch.context() as patch:
            for where, name, replacement in bug:
                patch.setattr(where, name, replacement, raising=False)
            with pytest.raises(AssertionError):
                check()


# ------------------------------------------------------------------------------
# Small models and stages


class Bigram(GPT):
    """The next token depends on the last one alone, by a table (V, V) of probabilities: log-probs
    are known by hand."""

    def __init__(self, table: torch.Tensor):
        size = len(table)
        super().__init__(GPTConfig(16, vocab_size=size, n_layer=1, n_head=1, n_embd=size))
        self.double().wte.weight.data = table.double().log().T.contiguous()

    def hidden(self, idx, pos, context):
        return F.one_hot(idx, self.config.vocab_size).to(self.wte.weight)


def logps(gpt: GPT, batch: data.Batch) -> torch.Tensor:
    """log pi of all completions, group after group."""
    return Scorer(gpt)(batch).sum(-1)[batch.mask]


def step(s, stage, ids) -> tuple[dict, torch.Tensor]:
    """(figures that are logged, gradient) of an update from these groups, at learning rate 0."""
    optimizer, seen = train.adamw(stage.policy.scorer, s, 0.0), []
    trained = [p for p in stage.policy.scorer.parameters() if p.requires_grad]
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.flatten() for p in trained))
    figures, _ = train.update(s, stage, optimizer, ids, 0.0)
    return figures, torch.cat(seen)


# ------------------------------------------------------------------------------
# What is scored


def test_the_prompt_is_scored_in_neither_and_every_token_of_the_response_in_both():
    """The prompt is masked in the chosen text only, the first token of the response is dropped, or
    targets are not shifted.

    Met in: OpenRLHF/OpenRLHF#294, jingyaogong/minimind#621.
    Must hold: log-probs known by hand; how likely the prompt is changes nothing.
    """
    W, X, A, B, END = range(5)
    table = torch.full((5, 5), 1 / 8)
    table[X, A], table[X, B], table[A, END], table[B, A] = 1 / 2, 1 / 8, 1 / 2, 1 / 2
    pair = pack([([W, X], [[A], [B, A]])], END)

    def check():
        for own in (1 / 2, 1 / 8):  # P(X | W), the prompt's own
            table[W] = (1 - own) / 4
            table[W, X] = own
            found = logps(Bigram(table), one_batch(pair))  # P(A|X) P(END|A), P(B|X) P(A|B) ...
            close(found, torch.tensor([1 / 4, 1 / 32], dtype=torch.float64).log())

    def prompt_in_the_rejected(self, batch):
        text = torch.cat([batch.prefix, batch.idx[:, 0, :1]], dim=1)
        own = self.gpt(text[:, :-1]).log_softmax(-1).gather(-1, text[:, 1:, None])
        return forward(self, batch) + own.sum() * torch.tensor([[[0.0], [1.0]]])

    def without_the_first(self, batch):
        return forward(self, batch)[..., 1:]

    def not_shifted(self, batch):
        return forward(self, batch._replace(targets=batch.idx))

    for bug in (prompt_in_the_rejected, without_the_first, not_shifted):
        holds_only_without(check, [(Scorer, "forward", bug)])


def test_padding_is_not_scored_and_not_seen():
    """Padding is scored, or attended to, so that its length or its content matters.

    Met in: huggingface/trl#6803, 0xallam/Direct-Preference-Optimization#4, NVIDIA/NeMo-Aligner#68.
    Must hold: log-probs are those of each text alone, whatever the padding's length and content.
    """
    gpt = tiny_gpt(block_size=48)
    alone = one_by_one(gpt, RAGGED)

    def check():
        for round_to in (1, 16):
            batch = one_batch(RAGGED, round_to)
            pad = torch.arange(batch.prefix.size(1)) >= batch.prefix_len[:, None]
            for content in range(V):
                idx = batch.idx.masked_fill(batch.targets < 0, content)
                prefix = batch.prefix.masked_fill(pad, content)
                close(logps(gpt, batch._replace(idx=idx, prefix=prefix)), alone)

    def all_scored(*arguments):
        batch = collate(*arguments)
        cells = torch.arange(batch.targets.numel())
        return batch._replace(targets=batch.targets.clamp(min=0), scored=cells)

    holds_only_without(
        check,
        [(data, "collate", all_scored)],
        [(model, "Tree", lambda n_head, shapes, masks=None: Tree(n_head, shapes))],
    )


def test_positions_count_from_each_texts_own_beginning():
    """Texts are padded on the left and positions count from the padding.

    Met in: ndif-team/nnsight#672, huggingface/trl#469, huggingface/trl#6800.
    Must hold: prompts of unlike length give the log-probs, and the samples, that they give alone.
    """
    gpt, prompts = tiny_gpt(block_size=48), [RAGGED.prompt(g) for g in range(len(RAGGED))]

    def check_training():
        close(logps(gpt, one_batch(RAGGED)), one_by_one(gpt, RAGGED))

    def check_sampling():
        alone = [gpt.generate([p], 12, temperature=0.0)[0] for p in prompts]
        assert gpt.generate(prompts, 12, temperature=0.0) == alone

    def from_the_padding(self, batch):  # which is hidden, but counted
        shift = batch.prefix.size(1) - batch.prefix_len
        per_token = [shift.repeat_interleave(batch[i][0].numel()) for i in (0, 2)]
        with pytest.MonkeyPatch.context() as patch:
            moved = torch.cat(per_token)
            patch.setattr(GPT, "hidden", lambda gpt, idx, pos, x: hidden(gpt, idx, pos + moved, x))
            return forward(self, batch)

    def from_the_longest(*arguments):
        cache, idx, pos = read_prompts(*arguments)
        return cache, idx, torch.full_like(pos, pos.max())

    holds_only_without(check_training, [(Scorer, "forward", from_the_padding)])
    holds_only_without(check_sampling, [(GPT, "read_prompts", from_the_longest)])


def test_end_of_text_is_learned_where_a_text_ended_and_only_there():
    """End-of-text is masked as padding is, or a text that was cut ends with one.

    Met in: meta-pytorch/torchtune#2967, huggingface/trl#741, huggingface/trl#884.
    Must hold: it is a target, with a gradient, where the text ended; there is none where it was
    cut.
    """
    gpt = tiny_gpt(block_size=48)

    def check():
        builder = Builder(8, EOT, Report())
        builder.add([1, 2], [[3, 4], [5] * 10])
        batch = one_batch(builder.groups())
        end = Scorer(gpt)(batch)[0, 0, 2]  # log pi(end of text | 1 2 3 4)
        assert torch.autograd.grad(end, gpt.wte.weight)[0][EOT].abs().max() > 0
        assert batch.targets[0].tolist() == [[3, 4, EOT, -1, -1, -1], [5] * 6]

    def masked(*arguments):
        batch = collate(*arguments)
        return batch._replace(targets=batch.targets.masked_fill(batch.targets == EOT, -1))

    def always(self, prompt, completions, ended, *rest):
        return put(self, prompt, completions, [True] * len(completions), *rest)

    holds_only_without(check, [(data, "collate", masked)], [(Builder, "put", always)])


# ------------------------------------------------------------------------------
# What is read


def test_cutting_leaves_no_pair_identical_or_empty(tmp_path):
    """Cutting to the longest length makes both texts of a pair equal, or empty: the loss is a
    constant .693 that teaches nothing.

    Met in: huggingface/trl#3398, huggingface/trl#6548, natolambert/rlhf-book#504.
    Must hold: such a pair is left out and counted by its reason; no completion is cut to nothing.
    """
    rows = [
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": "Q", "chosen": 40 * "a" + "b", "rejected": 40 * "a" + "c"},
        {"prompt": 100 * "Q", "chosen": "yes", "rejected": "no"},
    ]
    path = save(tmp_path, lines(*rows))

    def check():
        groups, report = data.read_groups([path], BYTES, block_size=16)
        assert report.unusable == {"identical within block_size": 1}
        assert len(groups) == 2
        assert all(groups.completions(g) == [list(b"yes"), list(b"no")] for g in range(2))

    def cut_as_one_text(self, prompt, completions, rewards=None, ended=True, place=""):
        cut = [np.append(prompt, y)[: self.block_size][len(prompt) :] for y in completions]
        self.put(prompt[: self.block_size], cut, [ended] * len(cut), rewards, place)

    def in_silence(self, *arguments, **more):
        add(self, *arguments, **more)
        self.report.unusable.clear()

    holds_only_without(check, [(Builder, "add", cut_as_one_text)], [(Builder, "add", in_silence)])


def test_special_tokens_in_text_are_text_and_nothing_is_put_before_it(tmp_path):
    """Text that spells a special token becomes that token; each text of a pair gets a token for its
    beginning, so that it stands twice, and within.

    Met in: axolotl-ai-cloud/axolotl#1616, FranxYao/Long-Context-Data-Engineering#14.
    Must hold: the tokens are those of the text, and no more; end-of-text is scored once.
    """
    row = {"prompt": "a<|endoftext|>", "chosen": "<|endoftext|>b", "rejected": "c"}
    path = save(tmp_path, lines(row))

    def check():
        groups, _ = data.read_groups([path], BYTES, block_size=64)
        assert [groups.segment(s) for s in range(3)] == [list(row[k].encode()) for k in row]
        batch = one_batch(groups)
        assert (batch.targets == BYTES.eot_token).sum(-1).tolist() == [[1, 1]]

    def as_control(encoding, text):
        return np.array(encoding.encode(text, allowed_special="all"), np.int32)

    def with_a_beginning(encoding, text):
        return np.array([encoding.eot_token, *encoding.encode_ordinary(text)], np.int32)

    holds_only_without(check, [(data, "encode", as_control)], [(data, "encode", with_a_beginning)])


def test_prompt_and_completion_are_joined_as_ids(tmp_path):
    """Prompt and completion are tokenized as one text, and cut at the length of the prompt alone:
    a token that spans the boundary moves it.

    Met in: haozheji/exact-optimization (src/align_stage/data.py), huggingface/trl#2054,
    huggingface/trl#1153.
    Must hold: prompt and completions have the ids that they have alone, in a batch, too.
    """
    merging = merging_encoding()
    row = {"prompt": "a", "chosen": "bcc", "rejected": "c"}
    path = save(tmp_path, lines(row))

    def check():
        groups, _ = data.read_groups([path], merging, block_size=16)
        assert groups.completions(0) == [list(b"bcc"), list(b"c")]
        assert one_batch(groups).idx[0].tolist() == [list(b"abcc"), [*b"ac", 0, 0]]

    def as_one_text(self, prompt, completions, *rest, **more):
        texts = [merging.decode([*prompt, *y]) for y in completions]
        cut = [merging.encode_ordinary(text)[len(prompt) :] for text in texts]
        return add(self, prompt, cut, *rest, **more)

    holds_only_without(check, [(Builder, "add", as_one_text)])


def test_packed_texts_do_not_see_each_other():
    """Texts share one row, and attention runs on from one into the next.

    Met in: allenai/open-instruct#1448, allenai/open-instruct#1900.
    Must hold: completions that share their prompt have the log-probs and the gradients that they
    have alone, in float64. (Running text for sft is cut into blocks, where texts do meet: data.py
    says so.)
    """
    gpt = tiny_gpt(block_size=48)
    weights = torch.linspace(-1, 1, int(RAGGED.is_completion().sum()), dtype=torch.float64)

    def check():
        found, alone = logps(gpt, one_batch(RAGGED)), one_by_one(gpt, RAGGED)
        close(found, alone)
        both = [torch.autograd.grad(x @ weights, list(gpt.parameters())) for x in (found, alone)]
        for gradient, gradient_alone in zip(*both, strict=True):
            close(gradient, gradient_alone)

    def one_row(n_head, shapes, masks=None):  # the K completions of a prompt, one after the other
        if masks is None:
            return Tree(n_head, shapes)
        (B, P), (rows, T) = shapes
        K = rows // B
        seen = masks[1][::K, :, :1, :P].expand(-1, -1, K * T, -1)
        causal = model.additive(model.causal_mask(K * T, K * T, "cpu"), seen.dtype)
        mask = torch.cat([seen, causal.expand(B, 1, -1, -1)], dim=-1)
        return Tree(n_head, [(B, P), (B, K * T)], [None, mask])

    holds_only_without(check, [(model, "Tree", one_row)])


# ------------------------------------------------------------------------------
# The reference


class Compiled(torch.nn.Module):
    """Stands for what torch.compile gives: the same function, rounded otherwise."""

    def __init__(self, module, **how):
        super().__init__()
        self._orig_mod = module

    def forward(self, batch):
        return self._orig_mod(batch) * (1 + 1e-3)


SAME_PATH = {  # how the policy may be computed; the reference goes with it
    "float32": [],
    "bfloat16": ["--dtype", "bfloat16"],
    "checkpointing": ["--gradient_checkpointing"],
    "accumulation": ["--micro_batch_size", 3],
    "compile": ["--compile", "--micro_batch_size", 3],
}


@pytest.mark.parametrize("how", SAME_PATH)
def test_the_reference_is_computed_as_the_policy_is(how, world, monkeypatch):
    """The reference runs in another precision, or through other code, than the policy.

    Met in: eric-mitchell/direct-preference-optimization#34, NVIDIA/NeMo-Aligner#228.
    Must hold: before the first step every log-ratio is exactly 0, in float32 and bfloat16, with
    checkpointing, accumulation and compile.
    """
    monkeypatch.setattr(torch, "compile", Compiled)

    def check():
        s, task = world.task("exo", "--max_iters", 3, *SAME_PATH[how])
        held_out = train.held_out_figures(s, task)
        for figures in (held_out, *(step(s, task, task.ids(i))[0] for i in range(task.steps))):
            ratios = figures["margin"], figures["chosen_logratio"], figures["rejected_logratio"]
            assert ratios == (0, 0, 0)

    def in_half(module, *rest):
        return score(copy.deepcopy(getattr(module, "_orig_mod", module)).bfloat16(), *rest)

    def through_forward(module, groups, *rest):
        out = torch.zeros(len(groups.ended), dtype=torch.float64)
        gpt = getattr(module, "_orig_mod", module).gpt
        out[groups.is_completion()] = one_by_one(gpt, groups).detach()
        return out

    def in_other_batches(module, groups, size, device, dtype, batches, *rest):
        return score(module, groups, size, device, dtype, None, *rest)

    holds_only_without(
        check, [(parallel, "score", in_half)], [(parallel, "score", through_forward)]
    )
    if how == "accumulation":  # elsewhere sums as small as these agree by chance
        holds_only_without(check, [(parallel, "score", in_other_batches)])


def global_order(groups, batch_size, seed, epoch):
    return np.array_split(np.random.permutation(len(groups)), len(groups) // batch_size)


def test_a_stored_reference_gives_the_run_of_a_live_one(world):
    """Stored log-probs of the reference are lost, or unlike those computed on the way, or to store
    them changes the order of the data.

    Met in: huggingface/trl#7083, huggingface/trl#1148.
    Must hold: an epoch with either is the same run, bit for bit.
    """

    def run(live: bool) -> tuple[list, torch.Tensor]:
        torch.manual_seed(0)
        np.random.seed(1)
        with pytest.MonkeyPatch.context() as patch:
            if live:
                patch.setattr(train.Preference, "ask_reference", lambda *_: None)
            s, stage = world.task("dpo", "--epochs", 1)
        if live:
            reference, loss = stage.policy.reference(), stage.loss
            stage.loss = lambda b: loss(b._replace(ref_logps=reference(b).sum(-1)))
        read, optimizer = [], train.adamw(stage.policy.scorer, s, 1e-2)
        for i in range(stage.steps):
            read.append(stage.ids(i).tolist())
            train.update(s, stage, optimizer, stage.ids(i), 1e-2)
        return read, torch.cat([p.flatten() for p in stage.policy.gpt.parameters()])

    def check():
        (read, weights), (read_live, weights_live) = run(live=False), run(live=True)
        assert read == read_live
        assert torch.equal(weights, weights_live)

    def rounded(*arguments):
        return score(*arguments).bfloat16().double()

    def with_a_draw(*arguments):  # as a loader that takes its seed from the global generator
        np.random.rand()
        ask_reference(*arguments)

    holds_only_without(
        check,
        [(parallel, "score", rounded)],
        [
            (data, "epoch_batches", global_order),
            (train.Preference, "ask_reference", with_a_draw),
        ],
    )


def test_there_is_no_dropout():
    """Dropout stays on in the policy, and its log-ratios are noise.

    Met in: huggingface/trl#744, huggingface/trl#3500.
    Must hold: two forward passes in training mode are equal, bit for bit.
    """
    scorer, batch = Scorer(tiny_gpt(block_size=48)).train(), one_batch(RAGGED)

    def check():
        assert torch.equal(scorer(batch), scorer(batch))

    def with_dropout(self, x):
        return F.dropout(mlp(self, x), 0.1, self.training)

    holds_only_without(check, [(model.MLP, "forward", with_dropout)])


# ------------------------------------------------------------------------------
# Sums and losses


def test_log_softmax_is_not_in_half_precision():
    """Logits or their log-softmax are kept in half precision, whose steps near -80 are a half.

    Met in: huggingface/trl#878, OpenRLHF/OpenRLHF#634.
    Must hold: from bfloat16 features and weights, logits near -80, log-probs are within 1e-4 of
    float64.
    """
    x, weight = rand(6, 9), rand(50, 9, seed=1)
    x[:, 0], weight[:, 0] = 8.0, -10.0  # shifts all logits by -80
    x, weight, targets = x.bfloat16(), weight.bfloat16(), torch.arange(6)

    def check():
        exact = (x.double() @ weight.double().T).log_softmax(-1)[range(6), targets]
        assert (model.token_logps(x, weight, targets).double() - exact).abs().max() < 1e-4

    def rounded_logits(x, weight, out=None):
        return (x @ weight.T).float()

    half_sums = [(model, "wide", lambda dtype: dtype)]
    holds_only_without(check, half_sums, [(model, "wide_logits", rounded_logits)])


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_changes_neither_gradient_nor_what_is_logged(stage, world):
    """Micro-batches are averaged whatever they hold, or not divided by their number, or the loss of
    the last one is logged.

    Met in: huggingface/trl#5710, huggingface/trl#2615, karpathy/nanochat#515.
    Must hold: 8 groups as 3 + 3 + 2 give the gradient and the logged loss of 8 at once.
    """

    def of_8_groups(size):
        more = "--dtype", "float64", "--grad_clip", 0, "--micro_batch_size", size
        s, task = world.task(stage, *more)
        ids = task.ids(0)  # drawn, where draws are learned from
        perturb(task.policy.scorer)  # at the reference all groups lose the same
        return *step(s, task, ids), type(task)

    def check():
        (whole, a, _), (parts, b, _) = map(of_8_groups, (8, 3))
        assert a.abs().max() > 1e-4
        close(b, a, rtol=1e-9, atol=1e-12)
        for figure in whole.keys() - {"grad_norm"}:
            close(parts[figure], whole[figure], rtol=1e-9, atol=1e-12)

    def last_is_logged(s, task, *rest):
        losses, loss = [], task.loss
        task.loss = lambda batch: losses.append(loss(batch)) or losses[-1]
        figures, work = update(s, task, *rest)
        return figures | {"loss": losses[-1][0].detach()}, work

    holds_only_without(
        check,
        [(of_8_groups(8)[-1], "weigh", lambda self, batch: 1)],  # the last one holds less
        [(train, "sum", max)],  # of the weights: each micro-batch a mean of its own, added up
        [(train, "update", last_is_logged)],
    )


def test_log_probs_are_summed_over_tokens():
    """The log-prob of a text is the mean over its tokens, so that length does not count.

    Met in: eric-mitchell/direct-preference-optimization#48, jingyaogong/minimind#659.
    Must hold: of tokens with probability 1/2 each, four give log 1/16, and two give log 1/4.
    """
    A, END = 0, 1
    coin = Bigram(torch.full((2, 2), 1 / 2))
    pair = pack([([A], [[A, A, A], [A]])], END)

    def check():
        want = torch.tensor([1 / 16, 1 / 4], dtype=torch.float64).log()
        close(logps(coin, one_batch(pair)), want)

    def mean(self, batch):
        return forward(self, batch) / batch.lengths()[..., None]

    holds_only_without(check, [(Scorer, "forward", mean)])


def test_beta_is_applied_once():
    """Beta multiplies the log-ratios, and then their difference again; at 1 nobody sees it.

    Met in: AI-Hypercomputer/maxtext#1530.
    Must hold: losses computed by hand, log-ratios (1, -1), at two betas.
    """
    ratio, ref = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.zeros(1, 2)
    golden = {0.1: (0.598139, 0.406304), 0.5: (0.313262, 0.114082)}

    def check():
        for beta, (dpo, exo_at_a_tenth) in golden.items():
            # -log sigmoid(2 beta);  q = sigmoid(2 beta): q log(q / .9) + (1 - q) log((1 - q) / .1)
            found = exo.dpo_loss(ratio, ref, exo.preference_target(0.0), beta)
            assert found.item() == pytest.approx(dpo, abs=1e-6)
            found = exo.exo_loss(ratio, ref, exo.preference_target(0.1), beta)
            assert found.item() == pytest.approx(exo_at_a_tenth, abs=1e-6)

    def twice(policy, ref, target, beta, mask):
        return policy_and_target(policy, ref, target, beta * beta, mask)

    policy_and_target = exo.policy_and_target
    holds_only_without(check, [(exo, "policy_and_target", twice)])


@pytest.mark.parametrize("name", ["exo_loss", "dpo_loss"])
def test_absent_pairs_are_outside_sum_and_count(name):
    """A pair that was masked has a margin of 0, and adds log 2 to the loss; or it adds nothing, and
    is counted.

    Met in: NVIDIA-NeMo/RL#180.
    Must hold: loss and gradient are those of the other pairs alone.
    """
    policy = rand(5, 2).requires_grad_()
    ref, target = torch.zeros(5, 2), exo.preference_target(0.1)
    there = torch.tensor([True, False, True, True, False])
    mask = there[:, None].expand(-1, 2)

    def check():
        loss = getattr(exo, name)
        every = loss(policy, ref, target, 0.5, mask)
        some = loss(policy[there], ref[there], target, 0.5)
        close(every, some)
        close(*(torch.autograd.grad(x, policy)[0] for x in (every, some)))

    def masked_margin(policy, ref, target, beta, mask=None):
        mask = torch.ones_like(policy, dtype=torch.bool) if mask is None else mask
        return loss(policy * mask, ref * mask, target, beta)

    loss = getattr(exo, name)
    holds_only_without(
        check,
        [(exo, name, masked_margin)],
        [(exo, "group_mean", lambda values, mask=None: values.mean())],
    )


def test_losses_leave_their_arguments_alone_and_read_label_smoothing(world):
    """The loss writes labels into its arguments, with an eps of its own: the setting is never read.

    Met in: haozheji/exact-optimization (src/align_stage/loss.py).
    Must hold: the inputs come back as they went in; the first loss of a run is that of its eps.
    """

    def check():
        target = exo.preference_target(0.1).expand(3, 2).clone()
        logps, mask = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.bool)
        given = [logps, logps.clone(), target, mask]
        before = [x.clone() for x in given]
        for loss in (exo.exo_loss, exo.dpo_loss):
            loss(*given[:3], 0.5, mask)
            assert all(map(torch.equal, given, before))
        for eps in (0.001, 0.1):
            s, stage = world.task("exo", "--label_smoothing", eps)
            known = -math.log(2) - math.log(eps * (1 - eps)) / 2  # KL((.5, .5) || (1 - eps, eps))
            assert step(s, stage, stage.ids(0))[0]["loss"].item() == pytest.approx(known, rel=1e-5)

    def labels_in_place(policy, ref, target, *rest):
        target[:, 0], target[:, 1] = 0.0, -10.0
        return exo_loss(policy, ref, target, *rest)

    exo_loss, target_of = exo.exo_loss, exo.preference_target
    holds_only_without(
        check,
        [(exo, "exo_loss", labels_in_place)],
        [(exo, "preference_target", lambda eps: target_of(math.exp(-10)))],
    )
