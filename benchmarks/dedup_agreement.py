"""Does our near deduplication decide as datatrove's MinHash pipeline? Agreement, its reasons, and speed, on JSONL.

    python benchmarks/dedup_agreement.py --corpus corpus.jsonl --peer_python /path/with/datatrove/bin/python

The peers live in an environment of their own (datatrove[processing], spacy), which runs this same file with --peer.
Both use word 5-grams and 14 bands of 8 rows. datatrove keeps any one document of a cluster; to compare decisions, of
its clusters too the first document is taken to be the one kept.

LSH finds a pair with a probability, so two runs with different hash functions differ by chance. What is chance and
what is not shows in three comparisons: ours with datatrove; datatrove with itself at another seed, the most that
different hash functions can agree; and datatrove on our words with datatrove on its own, with the same hash functions,
where the words alone can make a difference. The documents on which ours and datatrove differ are then explained by
the link that only one of the two found: its true Jaccard similarity over datatrove's n-grams. Speeds are of one
process each. datatrove's three runs take minutes each; --decisions FOLDER keeps them.
"""

import argparse
import json
import random
import re
import string
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

DECONTAMINATE_NGRAM, DECONTAMINATE_DOCUMENTS, PASSAGES = 13, 3000, 300
LINKS = 400  # pairs looked at for a document
sys.path[0] = str(Path(__file__).parents[1])  # data_prep.py beside this file is not the package


def read_texts(corpus: str) -> list[str]:
    with open(corpus, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def our_words(text: str) -> list[str]:
    """The words of docs/deduplication.md, as Python says them."""
    punctuation = set(string.punctuation + "«´»–—‘’“”„…∶━►、。〈〉《》「」【】！％（），．：；？［～")
    number = re.compile(r"\d+(?:[.,\u060c\u066b\u2396-\u2398]\d+)?")
    text = number.sub("0", unicodedata.normalize("NFC", text).lower())
    text = "".join(" " if c in punctuation or unicodedata.category(c) == "Cc" else c for c in text)
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return unicodedata.normalize("NFC", text).split()


def peer(corpus: str, seed: str, words: str, output: str) -> None:
    """Runs datatrove's steps in one process; writes each document's cluster (or -1) and the signatures' seconds.

    words: "theirs", or "ours" to give it our words in place of its own.
    """
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.logging import logger

    logger.remove()
    texts = read_texts(corpus)
    with tempfile.TemporaryDirectory() as folder:
        config = MinhashConfig(seed=int(seed))
        signature = MinhashDedupSignature(f"{folder}/signatures", config)
        signature.get_shingles("loads the word tokenizer before the clock starts, so that its start is not timed")
        if words == "ours":
            signature.get_shingles = lambda text: shingles_of(our_words(text), config.n_grams, signature._hash_func)
        started = time.process_time()
        signature.run((Document(text=text, id=str(i)) for i, text in enumerate(texts)), 0, 1)
        seconds = time.process_time() - started
        for bucket in range(config.num_buckets):
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(
                None, bucket, config.num_buckets
            )
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/removed", config, save_cluster_id=True).run(None, 0, 1)
        raw = b"".join(path.read_bytes() for path in Path(f"{folder}/removed").glob("*.clusters"))
    clusters = dict(struct.iter_unpack("<2I", raw))
    result = {"seconds": seconds, "clusters": [clusters.get(i, -1) for i in range(len(texts))]}
    Path(output).write_text(json.dumps(result))


def shingles_of(words: list[str], size: int, hash_of: Any) -> Any:
    """datatrove's hashes [n-grams, 1] of our words' n-grams."""
    import numpy as np

    grams = [hash_of(" ".join(words[i : i + size])) for i in range(len(words) - size + 1)]
    return np.array(grams, dtype=np.uint64).reshape((-1, 1))


def peer_similarities(corpus: str, pairs_file: str, output: str) -> None:
    """The true Jaccard similarities of pairs of documents, over datatrove's n-grams."""
    from datatrove.pipeline.dedup import MinhashDedupSignature

    pairs = json.loads(Path(pairs_file).read_text())
    wanted = {document for pair in pairs for document in pair}
    signature = MinhashDedupSignature(tempfile.gettempdir())
    texts = read_texts(corpus)
    sets = {number: set(signature.get_shingles(texts[number]).ravel().tolist()) for number in wanted}
    similarities = [len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for a, b in pairs]
    Path(output).write_text(json.dumps(similarities))


def peer_decontamination(corpus: str, evaluation: str, output: str) -> None:
    """datatrove's decontamination filter, 13-grams: whether each document stays, and the seconds taken."""
    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.text import ngrams, simplify_text

    config = NGramsDecontConfig(n_grams=DECONTAMINATE_NGRAM)
    with tempfile.TemporaryDirectory() as folder:
        step = NGramsDecontFilter(folder, config)
        hashes: set[int] = set()
        for text in read_texts(evaluation):  # what NGramsDecontIndexer does with a label; it wants lighteval
            words = step.tokenizer.word_tokenize(simplify_text(text, config.norm_config))
            hashes.update(map(step.hash_func, map(" ".join, ngrams(words, config.n_grams))))
        np.array(sorted(hashes), dtype=np.uint64).tofile(f"{folder}/texts.index.hashes")
        documents = [Document(text=text, id="") for text in read_texts(corpus)[:DECONTAMINATE_DOCUMENTS]]
        step.filter(documents[0])
        started = time.process_time()
        stays = [step.filter(document) is True for document in documents]
    Path(output).write_text(json.dumps({"stays": stays, "seconds": time.process_time() - started}))


def decontamination(corpus: str, python: str, texts: list[str]) -> None:
    """Prints the agreement on passages of documents, taken at random, as evaluation data."""
    from data_prep.decontamination import DecontaminateOptions
    from data_prep.documents import Batch, Part

    generator, passages = random.Random(0), []
    while len(passages) < PASSAGES:
        words = generator.choice(texts).split()
        start = generator.randrange(len(words))
        passages.append(" ".join(words[start : start + generator.randint(10, 60)]))
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"text": passage}) + "\n" for passage in passages)
        file.flush()
        theirs = run_peer(python, "decontamination", corpus, file.name)
        step = DecontaminateOptions.of([file.name], ngram=DECONTAMINATE_NGRAM).make(0)
    chosen = texts[:DECONTAMINATE_DOCUMENTS]
    started = time.process_time()
    left = step(Batch(Part(corpus, 0, 0, 0), chosen, [{}] * len(chosen), list(range(len(chosen))), 0))
    seconds = time.process_time() - started
    kept = set(left.lines)
    kept_alone = [i for i, stays in enumerate(theirs["stays"]) if not stays and i in kept]
    removed_alone = [i for i, stays in enumerate(theirs["stays"]) if stays and i not in kept]
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", chosen[i])) for i in removed_alone)
    agreed = 1 - (len(kept_alone) + len(removed_alone)) / len(chosen)
    print(
        f"decontamination, {PASSAGES} passages, {len(chosen):,} documents: same decision {agreed:.2%}; ours alone keeps"
        f" {len(kept_alone)} (tables of numbers), and removes {len(removed_alone)}, {chinese} of them Chinese;"
        f" {theirs['seconds'] / seconds:.0f}x as fast"
    )


def run_peer(python: str, *arguments: str) -> Any:
    """Runs this file's --peer in the peers' environment; returns the JSON that it wrote."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        subprocess.run([python, __file__, "--peer", *arguments, output.name], check=True)
        return json.loads(Path(output.name).read_text())


def firsts(clusters: list[int]) -> list[int]:
    """The first document of each document's cluster [documents]; itself where it is in none."""
    first: dict[int, int] = {}
    return [first.setdefault(cluster, i) if cluster >= 0 else i for i, cluster in enumerate(clusters)]


def ours(corpus: str, methods: tuple[str, ...]) -> list[int]:
    """The first document of each document's cluster [documents], by data_prep.duplicates."""
    import numpy as np

    from data_prep import duplicates
    from data_prep.documents import ReadOptions
    from data_prep.parts import Execution, working
    from data_prep.stream import Source

    source = Source((corpus,), ReadOptions(part_bytes=32_000_000))
    with (
        tempfile.TemporaryDirectory() as folder,
        working(Path(folder) / "job", {"command": "benchmark"}, source.files(), Execution(workers=1)) as work,
    ):
        assert work is not None
        found = duplicates.find_duplicates(work, source, duplicates.DuplicateOptions(methods))
        bases = np.cumsum([0, *(result["documents"] for result in found.results)])
        first = list(range(int(bases[-1])))
        for number, base in enumerate(bases[:-1]):
            drops = found.source.steps[-1].make(number).drops(0)
            columns = (drops.documents, drops.kept_parts, drops.kept_documents)
            for document, part, kept in zip(*columns, strict=True):
                first[base + document] = int(bases[part] + kept)
        return first


def signature_seconds(texts: list[str]) -> float:
    """Process time of our signatures (exact hash and 112 permutations), a megabyte of text at a time."""
    from data_prep.minhash import MinHashOptions, Texts, composed, exact_hashes, signatures

    started = time.process_time()
    for start in range(0, len(texts), 128):
        batch = Texts(composed(texts[start : start + 128]))
        exact_hashes(batch)
        signatures(batch, MinHashOptions())
    return time.process_time() - started


def agreement(a: list[int], b: list[int]) -> str:
    same = sum((a[i] == i) == (b[i] == i) for i in range(len(a)))
    only = [sum(x[i] != i and y[i] == i for i in range(len(a))) for x, y in ((a, b), (b, a))]
    return f"same decision {same / len(a):.2%} ({only[0]} removed by the first alone, {only[1]} by the second alone)"


def members(first: list[int]) -> dict[int, list[int]]:
    clusters: dict[int, list[int]] = {}
    for document, of in enumerate(first):
        clusters.setdefault(of, []).append(document)
    return clusters


def explain(corpus: str, python: str, mine: list[int], theirs: list[int]) -> None:
    """Prints how similar the links are that only one of the two found.

    A document that one removes and the other keeps is the first of a cluster of the other: the link goes from there
    to the rest of the one's cluster. Its similarity is that of the most similar such pair.
    """
    from data_prep.minhash import MinHashOptions

    sides = {"ours": (mine, theirs), "datatrove": (theirs, mine)}
    links: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for name, (one, other) in sides.items():
        of_one, of_other = members(one), members(other)
        for i in range(len(one)):
            if one[i] != i and other[i] == i:
                here = set(of_other[i])
                rest = [j for j in of_one[one[i]] if j not in here]
                links[i, name] = [(a, b) for a in sorted(here) for b in rest][:LINKS]
    pairs = sorted({pair for of_document in links.values() for pair in of_document})
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(pairs, file)
        file.flush()
        similarity = dict(zip(pairs, run_peer(python, "similarities", corpus, file.name), strict=True))
    nearest = {key: max(similarity[pair] for pair in of_document) for key, of_document in links.items()}
    options = MinHashOptions()
    for name in sides:
        bins = Counter(min(9, int(value * 10)) for (_, by), value in nearest.items() if by == name)
        text = ", ".join(f"0.{b}: {n}" for b, n in sorted(bins.items()))
        print(f"links that only {name} found, by true similarity (tenths from): {text}")
    chance = sum(0.001 < options.probability(value) < 0.999 for value in nearest.values())
    print(f"of these {len(nearest)}, {chance} are of pairs that match with a probability of 0.1 to 99.9 %")


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        mode, *rest = sys.argv[2:]
        {"clusters": peer, "similarities": peer_similarities, "decontamination": peer_decontamination}[mode](*rest)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--peer_python", required=True)
    parser.add_argument("--decisions", type=Path, help="folder that keeps datatrove's answers")
    arguments = parser.parse_args()
    answers = {}
    for seed, words in (("1", "theirs"), ("2", "theirs"), ("1", "ours")):
        kept = arguments.decisions and arguments.decisions / f"seed-{seed}-{words}.json"
        if kept and kept.exists():
            answers[seed, words] = json.loads(kept.read_text())
            continue
        answers[seed, words] = run_peer(arguments.peer_python, "clusters", arguments.corpus, seed, words)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(answers[seed, words]))
    theirs, reseeded, on_our_words = (firsts(answer["clusters"]) for answer in answers.values())
    texts = read_texts(arguments.corpus)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    mine = ours(arguments.corpus, ("near",))
    assert len(mine) == len(theirs) == len(texts)
    print(f"{len(texts):,} documents, {megabytes:.1f} MB")
    for name, first in (("ours", mine), ("datatrove", theirs), ("datatrove, another seed", reseeded)):
        removed = sum(first[i] != i for i in range(len(first)))
        print(f"removed by {name}: {removed} ({removed / len(first):.2%})")
    print(f"ours and datatrove: {agreement(mine, theirs)}")
    print(f"datatrove and itself at another seed: {agreement(theirs, reseeded)}")
    print(f"datatrove and itself on our words, same hash functions: {agreement(theirs, on_our_words)}")
    explain(arguments.corpus, arguments.peer_python, mine, theirs)
    decontamination(arguments.corpus, arguments.peer_python, texts)
    seconds, peer_seconds = signature_seconds(texts), answers["1", "theirs"]["seconds"]
    print(
        f"signatures, MB/s of one process: ours {megabytes / seconds:.1f} (exact hash included),"
        f" datatrove {megabytes / peer_seconds:.2f}: {peer_seconds / seconds:.0f}x"
    )


if __name__ == "__main__":
    main()
