"""Load thousands of damaged headers of grouped files: each must be refused with a sentence, or load and compute.

A header is that of a tiny model with one to three mutations, the same for the same --seed and number. A child loads
them one after another. Where it dies, another goes on. Such a crash is upstream's, not ours, if the same header with
its groups merged into plain tensors, and without the keys that our patches read, makes it die too.

    [python scripts/sanitized FOLDER] python scripts/fuzz_loader.py -n 10000 --decode

Exits with 1 if a crash is ours, a refusal gives no reason, or a sanitizer complains of the library.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import random
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import gguf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.runtime.gguf_header import (  # noqa: E402
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U32,
    U64,
    Header,
    Tensor,
    array,
    numbered,
    plain_files,
    plain_name,
    scalar,
    string,
    tiny_header,
)
from tests.runtime.load import Answer, Died, Loader, Request  # noqa: E402
from tests.runtime.ops import Type  # noqa: E402
from tests.runtime.tiny_gguf import N_LAYER  # noqa: E402

N_GROUPS_MAX = 7

INTEGERS = (0, 1, 2, 3, 7, 8, 9, 127, 255, 256, 257, 512, 513, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
SIZES = (*INTEGERS, 1 << 32, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-45, -1e-45, 1.0000001, 2.0, 1e30, -1.0, math.inf, -math.inf, math.nan)
ARCHITECTURES = tuple(gguf.MODEL_ARCH_NAMES.values())

# what the patch for expert skipping reads: one value per layer, a number, and an environment variable
THRESHOLDS = ("expert_skip_ratio", "expert_skip_protect_norm", "expert_skip_frequency")
STRENGTH = "expert_skip_strength"
STRENGTH_VARIABLE = "LLAMA_EXPERT_SKIP"
OUR_KEYS = b".expert_skip_"


@dataclasses.dataclass
class Case(Header):
    """A header, and what is set from outside the file."""

    override: float | int | None = None  # of the strength, in kv_overrides
    variable: str | None = None  # of the environment


def seeds(folder: Path) -> list[Case]:
    """Gate and up apart and fused, each with thresholds and without."""
    cases = []
    for arch, groups in (
        ("qwen3moe", [(Type.Q4_0, 3), (Type.Q3_K, 4), (Type.F16, 1)]),
        ("cohere2moe", [(Type.IQ2_XXS, 2), (Type.Q8_0, 2), (Type.Q4_K, 2), (Type.BF16, 2)]),
    ):
        header = tiny_header(folder, arch, groups)
        case = Case(arch, header.values, header.tensors)
        skipping = copy.deepcopy(case)
        for key in THRESHOLDS:
            skipping.put(key, array(F32, [0.25] * N_LAYER))
        skipping.put(STRENGTH, scalar(F32, 1.0))
        cases += [case, skipping]
    return cases


# mutations: (what to choose with, a header to change)

Mutation = Callable[[random.Random, Case], None]
MUTATIONS: dict[str, list[Mutation]] = collections.defaultdict(list)


def mutation(category: str) -> Callable[[Mutation], Mutation]:
    def register(function: Mutation) -> Mutation:
        MUTATIONS[category].append(function)
        return function

    return register


def a_group(rng: random.Random, header: Case) -> Tensor:
    return rng.choice(header.groups() or header.tensors)


def a_tensor(rng: random.Random, header: Case) -> Tensor:
    return rng.choice([a_group(rng, header), rng.choice(header.tensors)])


@mutation("groups")
def drop_group(rng: random.Random, header: Case) -> None:
    header.tensors.remove(a_group(rng, header))


@mutation("groups")
def drop_all_groups_of_one(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    header.tensors = [other for other in header.tensors if plain_name(other) != plain_name(tensor)]


@mutation("groups")
def renumber(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    tensor.name = numbered(tensor, rng.choice([*range(10), 12, -1, "01", "+1", "", " 1", "0x1", 1 << 32, 1 << 64]))


@mutation("groups")
def swap_numbers(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    other = rng.choice(header.siblings(tensor))
    tensor.name, other.name = other.name, tensor.name


@mutation("groups")
def one_more_group(rng: random.Random, header: Case) -> None:
    tensor = copy.deepcopy(a_group(rng, header))
    tensor.name = numbered(tensor, rng.choice([len(header.siblings(tensor)), N_GROUPS_MAX - 1, N_GROUPS_MAX]))
    tensor.ne[-1] = rng.choice([tensor.ne[-1], 0, 1])
    header.tensors.insert(rng.randrange(len(header.tensors) + 1), tensor)


@mutation("groups")
def many_groups(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    first = header.tensors.index(tensor)
    siblings_ = header.siblings(tensor)
    header.tensors = [other for other in header.tensors if other not in siblings_]
    for i in range(rng.randint(1, 9)):
        experts = rng.choice([1, 1, 1, 2])
        one = Tensor(numbered(tensor, i), [*tensor.ne[:-1], experts], rng.choice(siblings_).type)
        header.tensors.insert(min(first, len(header.tensors)), one)


@mutation("groups")
def resize(rng: random.Random, header: Case) -> None:
    a_group(rng, header).ne[-1] += rng.choice([-1, 1, 8, -3])


@mutation("groups")
def move_an_expert(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    tensor.ne[-1] -= 1
    rng.choice(header.siblings(tensor)).ne[-1] += 1


@mutation("groups")
def zero_experts(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    rng.choice(header.siblings(tensor)).ne[-1] += tensor.ne[-1]
    tensor.ne[-1] = 0


@mutation("groups")
def huge_groups_of_no_bytes(rng: random.Random, header: Case) -> None:
    """Rows of no elements: any number of experts fits into the file."""
    for tensor in header.siblings(a_group(rng, header)):
        tensor.ne[0] = 0
        tensor.ne[-1] = rng.choice([(1 << 63) - 1, 1 << 62, (1 << 63) - 8, tensor.ne[-1]])


@mutation("groups")
def duplicate(rng: random.Random, header: Case) -> None:
    header.tensors.append(copy.deepcopy(a_group(rng, header)))


@mutation("groups")
def plain_beside_groups(rng: random.Random, header: Case) -> None:
    tensor = copy.deepcopy(a_group(rng, header))
    tensor.ne[-1] = rng.choice([tensor.ne[-1], sum(other.ne[-1] for other in header.siblings(tensor))])
    tensor.name = plain_name(tensor) or tensor.name
    header.tensors.insert(rng.randrange(len(header.tensors) + 1), tensor)


@mutation("groups")
def plain_in_place_of_groups(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    header.merge(header.siblings(tensor), tensor.type)


@mutation("groups")
def another_suffix(rng: random.Random, header: Case) -> None:
    tensor = a_group(rng, header)
    tensor.name = tensor.name.replace(b"weight", rng.choice([b"bias", b"scale", b"weights", b"lora_a", b"", b"%s%n"]))


@mutation("groups")
def groups_of_a_dense_tensor(rng: random.Random, header: Case) -> None:
    tensor = rng.choice(header.tensors)
    tensor.name = tensor.name.replace(b".weight", b".g0.weight")


@mutation("tensors")
def swap_names(rng: random.Random, header: Case) -> None:
    one, two = rng.choice(header.tensors), a_group(rng, header)
    one.name, two.name = two.name, one.name


@mutation("tensors")
def shuffle(rng: random.Random, header: Case) -> None:
    rng.shuffle(header.tensors)


@mutation("tensors")
def another_type(rng: random.Random, header: Case) -> None:
    tensor = a_tensor(rng, header)
    tensor.type = rng.choice([*Type, *Type, 4, 5, 31, 37, 43, 255, -1, 1 << 31])


@mutation("tensors")
def another_type_for_all(rng: random.Random, header: Case) -> None:
    type = rng.choice(list(Type))
    for tensor in header.siblings(a_group(rng, header)):
        tensor.type = type


@mutation("tensors")
def another_size(rng: random.Random, header: Case) -> None:
    tensor = a_tensor(rng, header)
    tensor.ne[rng.randrange(len(tensor.ne))] = rng.choice(SIZES)


@mutation("tensors")
def other_dimensions(rng: random.Random, header: Case) -> None:
    tensor = a_tensor(rng, header)
    ne = tensor.ne
    tensor.ne = rng.choice([[*ne, 1], [*ne, 2], [*ne, 1, 1], ne[:-1], ne[:1], [], ne[::-1], [1, *ne], [*ne, 0]])


@mutation("tensors")
def another_offset(rng: random.Random, header: Case) -> None:
    rng.choice(header.tensors).offset = rng.choice([*SIZES, 32, 4096])


@mutation("tensors")
def another_name(rng: random.Random, header: Case) -> None:
    tensor = a_tensor(rng, header)
    name = tensor.name
    others = [b"", b"x" * 63, b"x" * 64, b"x" * 200, b"\xff\xfe", b"blk.%d", name + b"\0", name[:-1], name.upper()]
    others += [name.replace(b"blk.0", b"blk.9"), name.replace(b"blk.0", b"blk.-1")]
    tensor.name = rng.choice(others)


@mutation("values")
def drop_value(rng: random.Random, header: Case) -> None:
    if header.values:
        header.values.pop(rng.randrange(len(header.values)))


@mutation("values")
def duplicate_value(rng: random.Random, header: Case) -> None:
    if header.values:
        header.values.append(rng.choice(header.values))


@mutation("values")
def another_value(rng: random.Random, header: Case) -> None:
    if not header.values:
        return
    i = rng.randrange(len(header.values))
    key, value = header.values[i]
    type = struct.unpack("<I", value[:4])[0] if len(value) >= 4 else U32
    if type == U32:
        value = scalar(U32, rng.choice(INTEGERS))
    elif type == F32:
        value = scalar(F32, rng.choice(FLOATS))
    else:
        value = struct.pack("<I", rng.choice([*range(14), 1 << 31])) + value[4:]
    header.values[i] = (key, value)


@mutation("values")
def another_type_of_value(rng: random.Random, header: Case) -> None:
    if not header.values:
        return
    i = rng.randrange(len(header.values))
    value = rng.choice(
        [array(U32, [8] * n) for n in (0, 1, N_LAYER, 600)]
        + [array(STRING, ["a"] * N_LAYER), array(U32, [1], claimed=rng.choice(SIZES))]
        + [struct.pack("<I", STRING) + string(b"8"), struct.pack("<IQ", STRING, rng.choice(SIZES))]
        + [scalar(U64, rng.choice(SIZES)), scalar(F32, 8.0), scalar(I32, -1)]
    )
    header.values[i] = (header.values[i][0], value)


@mutation("values")
def another_number_of_experts(rng: random.Random, header: Case) -> None:
    key = rng.choice(["expert_count", "expert_used_count", "expert_feed_forward_length", "block_count"])
    value = rng.choice([scalar(U32, rng.choice(INTEGERS)), array(U32, [8] * rng.randint(0, 4))])
    header.put(key, value)


@mutation("values")
def another_architecture(rng: random.Random, header: Case) -> None:
    other = rng.choice(ARCHITECTURES)
    names = [other, other + "+grouped", other + "+grouped", "+grouped", "", "x" * 10000 + "+grouped"]
    names += [header.arch + end for end in ("", "+groupe", "+grouped+grouped", "+grouped\0", "+grouped ")]
    name = rng.choice(names)
    header.values = [pair for pair in header.values if pair[0] != b"general.architecture"]
    header.values.insert(0, (b"general.architecture", struct.pack("<I", STRING) + string(name.encode())))
    if rng.random() < 0.5:  # with its own keys
        header.values = [
            (key.replace(f"{header.arch}.".encode(), f"{other}.".encode()), value) for key, value in header.values
        ]


@mutation("thresholds")
def another_threshold(rng: random.Random, header: Case) -> None:
    numbers = [0.25] * N_LAYER
    numbers[rng.randrange(N_LAYER)] = rng.choice(FLOATS)
    header.put(rng.choice(THRESHOLDS), array(F32, numbers))


@mutation("thresholds")
def another_length_of_thresholds(rng: random.Random, header: Case) -> None:
    n = rng.choice([0, 1, N_LAYER - 1, N_LAYER + 1, 100, 513, 100000])
    claimed = rng.choice([None, None, N_LAYER, *SIZES])
    header.put(rng.choice(THRESHOLDS), array(F32, [0.25] * n, claimed))


@mutation("thresholds")
def another_type_of_thresholds(rng: random.Random, header: Case) -> None:
    type = rng.choice([U32, I32, BOOL, STRING, U64, F64])
    value = rng.choice([array(type, [1] * N_LAYER), scalar(F32, 0.5), scalar(I32, -1)])
    header.put(rng.choice(THRESHOLDS), value)


@mutation("thresholds")
def another_strength(rng: random.Random, header: Case) -> None:
    value = rng.choice(
        [scalar(F32, x) for x in FLOATS]
        + [
            array(F32, [1.0]),
            scalar(U32, 1),
            scalar(F64, 1.0),
            struct.pack("<I", 8) + string(b"1"),
        ]
    )
    header.put(STRENGTH, value)


@mutation("thresholds")
def strength_from_outside(rng: random.Random, header: Case) -> None:
    if rng.random() < 0.5:
        header.override = rng.choice([*FLOATS, 0, 1, -1])
    else:
        header.variable = rng.choice(
            ["0", "1", "0.5", "-1", "nan", "inf", "1e999", "", " ", "x", "1x", "1,5", "9" * 999]
        )


@mutation("bytes")
def flip_bits(rng: random.Random, header: Case) -> None:
    places = [(rng.random(), 1 << rng.randrange(8)) for _ in range(rng.choice([1, 1, 2, 8]))]

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        for place, bit in places if data else ():
            changed[int(place * len(data))] ^= bit
        return bytes(changed)

    header.damage.append(damage)


@mutation("bytes")
def overwrite(rng: random.Random, header: Case) -> None:
    place, new = rng.random(), struct.pack("<Q", rng.choice(SIZES))[: rng.choice([4, 8])]
    header.damage.append(lambda data: data[: (at := int(place * len(data)))] + new + data[at + len(new) :])


@mutation("bytes")
def cut_or_insert(rng: random.Random, header: Case) -> None:
    place, n, new = rng.random(), rng.choice([0, 1, 4, 8, 100]), rng.randbytes(rng.choice([0, 1, 4, 8]))
    header.damage.append(lambda data: data[: (at := int(place * len(data)))] + new + data[at + n :])


@mutation("bytes")
def end_early(rng: random.Random, header: Case) -> None:
    place = rng.random()
    header.damage.append(lambda data: data[: int(place * len(data))])


@mutation("bytes")
def another_count(rng: random.Random, header: Case) -> None:
    count = rng.choice(SIZES)
    match rng.randrange(3):
        case 0:
            header.n_values = rng.choice([count, len(header.values) - 1, len(header.values) + 1])
        case 1:
            header.n_tensors = rng.choice([count, len(header.tensors) - 1, len(header.tensors) + 1])
        case _:
            header.version = count % (1 << 32)


def mutated(seed: int, number: int, originals: list[Case]) -> tuple[Case, list[tuple[str, str]]]:
    """A header and the (category, mutation) that made it."""
    rng = random.Random(f"{seed} {number}")
    header = copy.deepcopy(rng.choice(originals))
    done: list[tuple[str, str]] = []
    while len(done) < 3 and (not done or rng.random() < 0.3):
        category = rng.choice(["groups", "groups", "tensors", "values", "thresholds", "bytes"])
        change = rng.choice(MUTATIONS[category])
        try:
            change(rng, header)
        except IndexError:  # an earlier mutation left nothing to choose from
            continue
        done.append((category, change.__name__))
    return header, done


def complaints(stderrs: list[str]) -> collections.Counter[str]:
    """What sanitizers said of the libraries without ending the child, and of how many children."""
    found: collections.Counter[str] = collections.Counter()
    for stderr in stderrs:
        errors = re.findall(r"\S+:\d+:\d+: runtime error: .*", stderr)
        found.update({re.sub(r"(value|address) \S+", r"\1 _", error) for error in errors})
        leaks = re.findall(r"(?:Direct|Indirect) leak of [^\n]*\n(?:    #.*\n)+", stderr)
        found.update({leak for leak in leaks if re.search(r"lib(llama|ggml)", leak)})
    return found


def is_patched(complaint: str) -> bool:
    """Whether the patches change a file that COMPLAINT names."""
    patches = "".join(patch.read_text(encoding="utf-8") for patch in (ROOT / "patches").glob("*.patch"))
    return any(f"/{path}:" in complaint for path in re.findall(r"^\+\+\+ b/(.*)", patches, re.MULTILINE))


class Fuzzer:
    def __init__(self, folder: Path, seed: int, decode: bool, loader: Loader, upstream: Loader) -> None:
        self.originals = seeds(folder)
        self.path = folder / "model.gguf"
        self.seed, self.decode, self.loader, self.upstream = seed, decode, loader, upstream
        self.known: set[str] = set()  # what is said where upstream crashes

    def load(self, loader: Loader, case: Case, number: int) -> Answer:
        case.write(self.path)
        strength = {} if case.override is None else {f"{case.arch}.{STRENGTH}": case.override}
        variable = {} if case.variable is None else {STRENGTH_VARIABLE: case.variable}
        repack = bool(number // 2 % 2)
        return loader.ask(Request(str(self.path), bool(number % 2), repack, self.decode, strength, variable))

    def crashes_upstream(self, case: Case, number: int) -> bool:
        for plain in plain_files(case, OUR_KEYS):
            try:
                self.load(self.upstream, Case(plain.arch, plain.values, plain.tensors, plain.version), number)
            except Died:
                return True
        return False

    def judge(self, death: Died, case: Case, number: int) -> str:
        """Where a failed assertion is upstream's, the next one in that line is too."""
        if death.how not in self.known:
            if not self.crashes_upstream(case, number):
                return "crash (OURS)"
            if re.search(r"\.(cpp|c|h):\d+: ", death.how):
                self.known.add(death.how)
        return "crash (upstream's)"


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("-n", "n_headers", default=10000, show_default=True)
@click.option("--first", default=0, help="Number of the first header.")
@click.option("--seed", default=0, show_default=True)
@click.option("--decode", is_flag=True, help="Compute with what loads.")
@click.option(
    "--upstream", type=click.Path(path_type=Path), help="Folder with an unpatched libllama to try plain files."
)
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for headers that crashed, and what was said.")
def main(
    n_headers: int,
    first: int,
    seed: int,
    decode: bool,
    upstream: Path | None,
    keep: Path | None,
) -> None:
    loader = Loader({"UBSAN_OPTIONS": "print_stacktrace=1"})  # complaints are collected, the child goes on
    judge = Loader({"LLAMA_CPP_LIB_PATH": str(upstream)}) if upstream else Loader(loader.environment)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    sentences: collections.Counter[str] = collections.Counter()
    deaths: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    silent: list[int] = []
    started = time.monotonic()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        fuzzer = Fuzzer(Path(folder), seed, decode, loader, judge)
        for number in range(first, first + n_headers):
            case, done = mutated(seed, number, fuzzer.originals)
            try:
                answer = fuzzer.load(loader, case, number)
                outcome = answer.outcome
                if outcome == "refused":
                    sentences[re.sub(r"'[^']*'|\S*/\S*|\d+", "_", answer.sentence)] += 1
                    if not answer.sentence:
                        silent.append(number)
            except Died as death:
                outcome = fuzzer.judge(death, case, number)
                deaths[outcome, death.how].append(number)
                if keep:
                    case.write(keep / f"{number}.gguf")
                    (keep / f"{number}.txt").write_text(f"{outcome} {done}\n{death.stderr}")
            for category in {"all", *(category for category, _ in done)}:
                outcomes[category][outcome] += 1
        loader.close()
        judge.close()
    seconds = time.monotonic() - started
    found = complaints(loader.stderrs)

    columns = sorted(outcomes["all"])
    print("| mutated |", " | ".join(columns), "|")
    print("|---|" + "---:|" * len(columns))
    for category in [*MUTATIONS, "all"]:
        print(f"| {category} |", " | ".join(str(outcomes[category][column]) for column in columns), "|")
    print(f"\n{n_headers} headers in {seconds:.0f} s, {n_headers / seconds:.1f} per second, seed {seed}")
    print(f"\n{len(sentences)} sentences of refusal, the most frequent:")
    for sentence, n in sentences.most_common(12):
        print(f"{n:6} {sentence[:150]}")
    for (outcome, how), numbers in sorted(deaths.items()):
        print(f"\n{outcome}: {len(numbers)} times, headers {numbers[:5]}\n  {how}")
    if silent:
        print(f"\nrefused without a sentence: {len(silent)} headers, {silent[:10]}")
    for complaint, n in found.most_common():
        whose = "OURS" if is_patched(complaint) else "upstream's"
        print(f"\nsanitizer ({whose}), {n} children: {complaint}")
    ours = any("OURS" in outcome for outcome, _ in deaths)
    ours = ours or any(map(is_patched, found))
    sys.exit(int(ours or bool(silent)))


if __name__ == "__main__":
    main()
