#!/usr/bin/env python3
"""Reads what examples/trace.c writes, without the library: trace.py [--self-test] OUT.json OUT.svg TABLE (its stdout).
With --pipe what examples/pipeline.c --rows --trace OUT.json --svg OUT.svg writes.

Chrome trace: every begin has its end on the same track, times go up, calls of a rank do not overlap, asynchronous pairs are complete, names are known, members of a
group made the same calls, none ended before the last had begun (what was started: before the last had started it; ranks may wait in any order). Table: calls, bytes, times and who came last as the trace has them. Picture: well-formed; a bar for
each call, where the axis says it was, inside of its track, none over another. Exit status 1 and a line that says what is wrong.
--self-test damages the three in every way that they are checked for; each must be found."""
import json
import re
import sys
import xml.etree.ElementTree as xml

NAMES = {"AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Permute", "Broadcast", "Send", "Recv", "Barrier"}
TOGETHER = NAMES - {"Broadcast", "Send", "Recv"}       # nobody gets out before the last one is in
UNIT = {"ns": 1e-3, "us": 1, "ms": 1e3, "s": 1e6}
SVG = "{http://www.w3.org/2000/svg}"


class Bad(Exception):
    pass


def need(condition, text):
    if not condition:
        raise Bad(text)


def read_calls(trace, known=lambda name: name in NAMES):
    """{rank: [(begin, end, name, args)]}, times in us; args["started"]: when it was started, or began."""
    calls, begun, last, flying, done, started = {}, {}, {}, {}, set(), {}
    for e in trace["traceEvents"]:
        need(e["ph"] in ("M", "B", "E", "b", "e"), f"a phase of no kind: {e}")
        if e["ph"] == "M":
            need(e["name"] == "thread_name" and e["args"]["name"] == f"rank {e['tid']}", f"a track without its rank: {e}")
            need(e["tid"] not in calls, f"rank {e['tid']} has two tracks")
            calls[e["tid"]] = []
            continue
        rank, ts = e["tid"], e["ts"]
        need(rank in calls, f"a call of rank {rank}, which has no track")
        need(ts >= 0, f"rank {rank}: a time before the first: {e}")
        if e["ph"] in "be":
            key = (e["cat"], e["id"])
            name = e["name"].replace(" in flight", "")
            need(name in NAMES, f"unknown name: {e}")
            if e["ph"] == "b":
                need(key not in flying and key not in done, f"id twice: {e}")
                flying[key] = (rank, name, ts)
            else:
                need(flying.get(key, ())[:2] == (rank, name) and ts >= flying[key][2], f"an asynchronous end without its begin: {e}")
                done.add(key)
                started[rank, name, ts] = flying.pop(key)[2]
            continue
        need(ts >= last.get(rank, 0), f"rank {rank}: {ts} us comes after {last.get(rank)}: calls overlap, or time runs back")
        last[rank] = ts
        if e["ph"] == "B":
            need(rank not in begun, f"rank {rank}: a call begins in another one: {e}")
            need(known(e["name"].replace("wait ", "", 1)), f"unknown name: {e}")
            begun[rank] = e
        else:
            need(rank in begun, f"rank {rank}: an end without its begin at {ts} us")
            b = begun.pop(rank)
            calls[rank].append((b["ts"], ts, b["name"].replace("wait ", "", 1), b["args"]))
    need(not begun, f"never ended: {begun}")
    need(not flying, f"in flight for ever: {flying}")
    for rank, list_ in calls.items():
        for begin, end, name, args in list_:
            args["started"] = started.get((rank, name, end), begin)
    return calls


def read_groups(calls):
    """{group: [[call of each member] of each collective]}; members made the same ones in the same order."""
    own = {}
    for rank, list_ in calls.items():
        for call in list_:
            if call[2] not in ("Send", "Recv"):
                own.setdefault(call[3]["group"], {}).setdefault(rank, []).append(call)
    groups = {}
    for group, members in own.items():
        need(len({len(c) for c in members.values()}) == 1, f"group {group}: its ranks made {[len(c) for c in members.values()]} calls")
        groups[group] = list(zip(*(sorted(list_, key=lambda call: call[3]["started"]) for list_ in members.values())))
        for k, row in enumerate(groups[group]):
            what = f"group {group}, call {k}: {row}"
            need(len({c[2] for c in row}) == 1, f"not the same call: {what}")
            need(all(c[3]["ranks"] == len(members) for c in row), f"not all of its ranks: {what}")
            need(len({c[3].get("last") for c in row}) == 1 and row[0][3].get("last", next(iter(members))) in members, f"who came last? {what}")
            need(row[0][2] not in TOGETHER or min(c[1] for c in row) >= max(c[3]["started"] for c in row), f"ended before all had begun: {what}")
    return groups


def check_table(groups, made_by, text):
    rows = {}
    for line in text.split("came last\n", 1)[1].splitlines():
        m = re.fullmatch(r" *(\d+) +(\d+) +([\d,/.-]+) +(\d+) +(\d+) +([\d.]+) +([\d.]+) *(.*)", line)
        if m:
            rows[int(m[1])] = m.groups()[1:]
    need(rows.keys() == groups.keys(), f"groups of the table {sorted(rows)}, of the trace {sorted(groups)}")
    for group, calls in groups.items():
        ranks, members, n, size, mean, least, came = rows[group]
        m = re.fullmatch(r"(\d+)-(\d+)(?:/(\d+))?", members)
        listed = list(range(int(m[1]), int(m[2]) + 1, int(m[3] or 1))) if m else [int(r) for r in members.split(",")]
        need(listed == made_by[group], f"group {group}: the table's members are {members}, the trace's {made_by[group]}")
        late = [c[0][3]["last"] for c in calls if "last" in c[0][3]]
        want = " ".join(f"rank {r} {100.0 * late.count(r) / len(late):.0f} %" for r in sorted(set(late)))
        need((int(ranks), int(n)) == (len(calls[0]), len(calls)), f"group {group}: the table has {n} calls of {ranks} ranks, the trace {len(calls)} of {len(calls[0])}")
        need(int(size) == sum(c[0][3]["bytes"] for c in calls), f"group {group}: the table has {size} bytes")
        for said, found in ((mean, sum(sum(c[1] - c[0] for c in row) / len(row) for row in calls)), (least, sum(min(c[1] - c[0] for c in row) for row in calls))):
            need(abs(1e3 * float(said) - found) <= 0.51 + 1e-3 * len(calls), f"group {group}: the table says {said} ms, the trace {found} us")
        need(came.split() == want.split(), f"group {group}: the table says that \"{came}\" came last, the trace \"{want}\"")


def box(rect):
    return tuple(float(rect.get(k)) for k in ("x", "y", "width", "height"))


def check_picture(calls, text):
    root = xml.fromstring(text)
    width, height = float(root.get("width")), float(root.get("height"))
    rects = [r for r in root.iter(SVG + "rect") if r.get("x")]
    texts = [(t.text or "", float(t.get("x")), float(t.get("y"))) for t in root.iter(SVG + "text")]
    for r in rects:
        x, y, w, h = box(r)
        need(x >= 0 and y >= 0 and w >= 0 and h > 0 and x + w <= width and y + h <= height, f"outside of the picture: {r.attrib}")
    need(all(0 <= x <= width and 0 <= y <= height for _, x, y in texts), "a text outside of the picture")
    ticks = [(float(m[1]) * UNIT[m[2]], x) for t, x, _ in texts for m in [re.fullmatch(r"([\d.]+) (ns|us|ms|s)", t)] if m]
    zero = [x for t, x, _ in texts if t == "0"]
    need(len(ticks) >= 2 and len(zero) == 1, f"an axis needs a zero and two times: {ticks}")
    scale = (ticks[-1][1] - zero[0]) / ticks[-1][0]                                        # pixels a us
    need(all(abs(zero[0] + scale * t - x) < 0.2 for t, x in ticks), f"uneven steps: {ticks}")
    tracks = {}
    for rank in calls:
        label = [y for t, _, y in texts if t == f"rank {rank}"]
        need(len(label) == 1, f"{len(label)} labels of rank {rank}")
        row = [box(r) for r in rects if r.get("fill") == "#eee" and box(r)[1] < label[0] < box(r)[1] + box(r)[3]]
        need(len(row) == 1, f"rank {rank} has {len(row)} tracks")
        tracks[rank] = row[0]
    drawn = 0
    for rank, (left, top, length, high) in tracks.items():
        bars = [r for r in rects if r.find(SVG + "title") is not None and (box(r)[1], box(r)[3]) == (top, high)]
        need(len(bars) == len(calls[rank]), f"rank {rank}: {len(bars)} bars, {len(calls[rank])} calls")
        drawn, before = drawn + len(bars), left
        for bar, (begin, end, name, args) in zip(bars, calls[rank]):
            x, _, w, _ = box(bar)
            title = bar.find(SVG + "title").text
            need(x >= before - 0.01 and x + w <= left + length + 0.01, f"rank {rank}: over another bar or the end of the track: {bar.attrib} {title}")
            before = x + w
            need(abs(x - zero[0] - scale * begin) < 0.3 and -0.3 < w - scale * (end - begin) < 1.3, f"rank {rank}: not where the axis says: {begin} to {end} us, {bar.attrib}")
            need(name in title and f"group {args['group']} " in title and f"{args['bytes']} bytes" in title, f"rank {rank}: {title} is not {name} {args}")
            need(("last" in args) == ("came last" in title) and f"rank {args.get('last', '')}" in title, f"rank {rank}: who came last: {title}, {args}")
    need(drawn == sum(r.find(SVG + "title") is not None for r in rects), "bars of no track")


def check_pipe(trace, picture, table):
    """What examples/pipeline.c --rows (with --tied: --lowered) writes, at F = 1 forward of memory and free transfers or not: rows, trace and picture say the same; nothing before what it
    needs."""
    calls = read_calls(json.loads(trace), lambda name: re.fullmatch(r"\d+([FBIW]\d+|REDUCE_GRAD\d*)", name))
    rows = {int(m[1]): [a for a in m[2].split(",") if not re.search("SEND|RECV", a)] for m in re.finditer(r"(?m)^(\d+): (.*)$", table)}
    need(rows.keys() == calls.keys() and all(rows[r] == [c[2] for c in calls[r]] for r in rows), "the rows and the trace do other things")
    did = {c[2].replace("B", "I"): c for list_ in calls.values() for c in list_ if "REDUCE_GRAD" not in c[2]}
    sums = [(list_, k, c) for list_ in calls.values() for k, c in enumerate(list_) if "REDUCE_GRAD" in c[2]]
    for list_, k, (begin, end, name, args) in sums:
        need(name == f"{args['stage']}REDUCE_GRAD{args['shared'] or ''}", f"{name} is not {args}")
        need(not any(c[2].startswith(str(args["stage"])) and c[2][len(str(args["stage"]))] in "BW" for c in list_[k:]), f"{name} comes before what it sums")
        same = [c for _, _, c in sums if c[3]["shared"] == args["shared"]]
        need(len(same) > 1 and all(abs(c[0] - begin) < 0.002 and abs(c[1] - end) < 0.002 for c in same), f"{name} is not at one time on all ranks")
    last = max(c[3]["stage"] for c in did.values())
    for name, (begin, end, _, args) in did.items():
        stage, kind, micro = re.fullmatch(r"(\d+)([FIW])(\d+)", name).groups()
        stage = int(stage)
        need((args["stage"], args["micro"]) == (stage, int(micro)), f"{name} is not {args}")
        before = [f"{stage - 1}F{micro}"] if kind == "F" and stage else [f"{stage}I{micro}"] if kind == "W" else [f"{stage}F{micro}"] if kind == "I" else []
        before += [f"{stage + 1}I{micro}"] if kind == "I" and stage < last else []
        for b in before:
            need(b in did and did[b][1] <= begin + 0.002, f"{name} comes before {b}")
    makespan = max(c[1] for list_ in calls.values() for c in list_)
    span = max(list_[-1][1] - next(c[0] for c in list_ if "F" in c[2]) for list_ in calls.values())
    said = re.search(r"(?m)^makespan (\S+)  span (\S+)$", table)
    need(said and abs(1e6 * float(said[1]) - makespan) < 1 and abs(1e6 * float(said[2]) - span) < 1, f"makespan {makespan}, span {span} us in the trace")
    root = xml.fromstring(picture)
    width, height = float(root.get("width")), float(root.get("height"))
    rects = [r for r in root.iter(SVG + "rect") if r.get("x")]
    texts = [(t.text or "", float(t.get("x")), float(t.get("y"))) for t in root.iter(SVG + "text")]
    need(all(0 <= x <= width and 0 <= y <= height for _, x, y in texts), "a text outside of the picture")
    axis = [(float(t), x) for t, x, y in texts if y == max(y for _, _, y in texts)]
    need(len(axis) > 2 and axis[0][0] == 0, f"an axis needs a zero and two times: {axis}")
    scale = (axis[-1][1] - axis[0][1]) / axis[-1][0] / 1e6
    need(all(abs(axis[0][1] + scale * 1e6 * t - x) < 0.2 for t, x in axis), f"uneven steps: {axis}")
    for rank, list_ in calls.items():
        label = [y for t, _, y in texts if t == f"rank {rank}"]
        need(len(label) == 1, f"{len(label)} labels of rank {rank}")
        row = [box(r) for r in rects if r.get("fill") == "#eee" and box(r)[1] < label[0] < box(r)[1] + box(r)[3]]
        need(len(row) == 1, f"rank {rank} has {len(row)} tracks")
        bars = [r for r in rects if r.find(SVG + "title") is not None and (box(r)[1], box(r)[3]) == (row[0][1], row[0][3])]
        need(len(bars) == len(list_), f"rank {rank}: {len(bars)} bars, {len(list_)} actions")
        held = peak = 0
        for bar, (begin, end, name, _) in zip(bars, list_):
            x, _, w, _ = box(bar)
            need(abs(x - axis[0][1] - scale * begin) < 0.3 and abs(w - scale * (end - begin)) < 0.3, f"not where the axis says: {name}")
            need(bar.find(SVG + "title").text.startswith(name + ": "), f"{name} is called {bar.find(SVG + 'title').text}")
            held += 0 if "REDUCE" in name else {"F": 1, "B": -1}.get(re.search("[FBIW]", name)[0], -0.5)
            peak = max(peak, held)
        busy = sum(c[1] - c[0] for c in list_ if "REDUCE" not in c[2])
        said = re.search(rf"(?m)^rank {rank}: bubble (\S+) % \S+ of the makespan\), peak in flight (\S+)$", table)
        need(said and abs(float(said[1]) - 100 * (1 - busy / makespan)) < 0.01, f"rank {rank}: bubble {100 * (1 - busy / makespan)} %")
        curve = root.findall(f".//{SVG}path[{SVG}title='memory of rank {rank}, at most {peak:g}']")
        need(float(said[2]) == peak and len(curve) == 1, f"rank {rank}: peak {peak}")
        need(min(abs(float(v) - row[0][1]) for v in re.findall(r"V([\d.]+)", curve[0].get("d"))) < row[0][3] + 30, f"rank {rank}: its curve is elsewhere")
    need(sum(map(len, calls.values())) == sum(r.find(SVG + "title") is not None for r in rects), "bars of no track")
    return sum(map(len, calls.values())), len(calls)


def self_test_pipe(trace, picture, table):
    """Damages one thing at a time, as self_test does."""
    bar = re.search(r'<rect x="([\d.]+)"[^>]*><title>(\d+F2)[^<]*</title></rect>', picture)
    made = (
        ("do other things", (trace, picture, re.sub(r"(?m)^(1: .*?)(\d+F\d+)(,.*?)(\d+F\d+)", r"\1\4\3\2", table))),
        ("do other things", (trace.replace('"1F2"', '"1F1"', 1), picture, table)),
        ("is not", (trace.replace('"micro": 2', '"micro": 1', 1), picture, table)),
        ("comes before", (re.sub(r'("1F0", [^{}]*"ts": )[\d.]+', r"\g<1>0", trace), picture, table)),
        ("span ", (trace, picture, table.replace("makespan ", "makespan 1", 1))),
        ("bubble", (trace, picture, table.replace("bubble ", "bubble 1"))),
        ("peak", (trace, picture, table.replace("in flight ", "in flight 1"))),
        ("peak", (trace, picture.replace("at most ", "at most 1"), table)),
        ("bars, ", (trace, picture.replace(bar[0], ""), table)),
        ("not where the axis says", (trace, picture.replace(bar[0], bar[0].replace(bar[1], str(float(bar[1]) + 1))), table)),
        ("is called", (trace, picture.replace(bar[0], bar[0].replace(bar[2], "9F9")), table)),
        ("labels of rank 0", (trace, picture.replace(">rank 0<", ">rank<"), table)),
        ("unknown name", (trace.replace('"1F2"', '"1X2"', 1), picture, table)),
        ("mismatched tag", (trace, picture.replace("</g>", "", 1), table)),
    )
    if "REDUCE_GRAD" in trace:
        made += (
            ("at one time", (re.sub(r'(REDUCE_GRAD", [^{}]*"ts": )([\d.]+)', lambda m: f"{m[1]}{float(m[2]) + 1}", trace, count=1), picture, table)),
            ("is not", (trace.replace('"shared": 0', '"shared": 1', 1), picture, table)),
            ("do other things", (trace, picture, table.replace(",0REDUCE_GRAD", "", 1))),
        )
    for words, files in made:
        need(files != (trace, picture, table), f"nothing was changed: {words}")
        try:
            check_pipe(*files)
        except (Bad, ValueError, xml.ParseError) as error:
            need(words in str(error), f"\"{words}\" was to be found, not: {error}")
            continue
        raise Bad(f"not found: {words}")
    return len(made)


def check(trace, picture, table):
    calls = read_calls(json.loads(trace))
    groups = read_groups(calls)
    made_by = {group: sorted(rank for rank, list_ in calls.items() if any(c[3]["group"] == group for c in list_)) for group in groups}
    check_table(groups, made_by, table)
    check_picture(calls, picture)
    return sum(map(len, calls.values())), len(calls)


def self_test(trace, picture, table):
    """Damages one thing at a time; the complaint must have the words given. Needs 2 ranks or more. Returns how many there were."""
    n = 0

    def damaged(words, files):
        nonlocal n
        n += 1
        need(files != (trace, picture, table), f"nothing was changed: {words}")
        try:
            check(*files)
        except (Bad, ValueError, xml.ParseError) as error:
            need(words in str(error), f"\"{words}\" was to be found, not: {error}")
            return
        raise Bad(f"not found: {words}")

    def events(words, change):
        document = json.loads(trace)
        change(document["traceEvents"])
        damaged(words, (json.dumps(document), picture, table))

    def at(list_, phase, k=5):                         # of rank 1
        return [i for i, e in enumerate(list_) if e["ph"] == phase and e["tid"] == 1][k]

    def begins(list_):                                 # of all ranks
        return [e for e in list_ if e["ph"] == "B"]

    def swap(list_, i, j):
        list_[i]["ts"], list_[j]["ts"] = list_[j]["ts"], list_[i]["ts"]

    def drop(list_, rank, k):
        for phase in "BE":
            list_.remove([e for e in list_ if e["ph"] == phase and e["tid"] == rank][k])

    def crossed(at):                                   # rank 0 waits for the first of two before the second; rank 1, which started them at `at`, for the second one first
        list_ = [{"ph": "M", "name": "thread_name", "tid": r, "args": {"name": f"rank {r}"}} for r in (0, 1)]
        for i, (r, start, begin, end) in enumerate(((0, 0, 2, 10), (0, 1, 11, 12), (1, at + 1, at + 1, at + 2), (1, at, 15, 16))):
            same = {"cat": "comm", "tid": r, "id": i}
            list_ += [dict(same, name="AllReduce in flight", ph="b", ts=start), dict(same, name="AllReduce in flight", ph="e", ts=end),
                      dict(same, name="wait AllReduce", ph="B", ts=begin, args={"group": 0, "ranks": 2, "bytes": 4, "last": 1}), dict(same, ph="E", ts=end)]
        return list_

    read_groups(read_calls({"traceEvents": crossed(9.5)}))
    try:
        read_groups(read_calls({"traceEvents": crossed(10.5)}))
        raise Bad("not found: started when another one had ended")
    except Bad as error:
        need("ended before all had begun" in str(error), str(error))
    flight = {"name": "AllReduce in flight", "cat": "comm", "id": 0, "pid": 0, "tid": 1, "ts": 1}
    events("a phase of no kind", lambda l: l[at(l, "B")].update(ph="X"))
    events("a track without its rank", lambda l: l[at(l, "M", 0)]["args"].update(name="rank 0"))
    events("has two tracks", lambda l: l.append(l[at(l, "M", 0)]))
    events("which has no track", lambda l: l.pop(at(l, "M", 0)))
    events("a time before the first", lambda l: begins(l)[0].update(ts=-0.001))
    events("begins in another one", lambda l: l.pop(at(l, "E")))
    events("an end without its begin", lambda l: l.pop(at(l, "B")))
    events("never ended", lambda l: l.pop(at(l, "E", -1)))
    events("time runs back", lambda l: swap(l, at(l, "B"), at(l, "E")))
    events("time runs back", lambda l: swap(l, at(l, "E"), at(l, "B", 6)))
    events("begins in another one", lambda l: l.insert(at(l, "E"), l.pop(at(l, "B", 6))))
    events("unknown name", lambda l: l[at(l, "B")].update(name="AllReduse"))
    events("unknown name", lambda l: l.append(dict(flight, name="flight", ph="b")))
    events("in flight for ever", lambda l: l.append(dict(flight, ph="b")))
    events("an asynchronous end without its begin", lambda l: l.append(dict(flight, ph="e")))
    events("an asynchronous end without its begin", lambda l: l.extend((dict(flight, ph="b"), dict(flight, ph="e", ts=0))))
    events("id twice", lambda l: l.extend(dict(flight, ph=p) for p in "bebe"))
    events("its ranks made", lambda l: drop(l, 1, 5))
    events("not the same call", lambda l: l[at(l, "B")].update(name="Barrier"))
    events("not all of its ranks", lambda l: [e["args"].update(ranks=99) for e in begins(l)])
    events("who came last?", lambda l: l[at(l, "B")]["args"].update(last=1 - l[at(l, "B")]["args"]["last"]))
    events("who came last?", lambda l: [e["args"].update(last=99) for e in begins(l)])
    events("ended before all had begun", lambda l: [e.update(ts=e["ts"] + 1e6) for e in l if e["ph"] in "BE" and e["tid"] == 1])
    events("groups of the table", lambda l: [e["args"].update(group=e["args"]["group"] + 77) for e in begins(l)])
    events("calls of", lambda l: [drop(l, rank, 5) for rank in {e["tid"] for e in l}])
    events("bytes", lambda l: [e["args"].update(bytes=e["args"]["bytes"] + 4) for e in begins(l)])
    events("ms, the trace", lambda l: [e.update(ts=e["ts"] * 1.5) for e in l if e["ph"] in "BE"])
    events("not where the axis says", lambda l: [e.update(ts=e["ts"] + 100) for e in l if e["ph"] in "BE"])
    damaged("Expecting", (trace[:-3], picture, table))
    row = re.search(r"(?m)^( *[1-9]\d* +\d+ +[\d,/-]+ +)(\d+)( +)(\d+)( +)([\d.]+)( +)([\d.]+) +rank (\d+)", table)
    damaged("members are", (trace, picture, table[:row.start()] + re.sub(r"^( *\d+ +\d+ +)\d+", r"\g<1>9", row[0]) + table[row.end():]))
    for group, words in ((2, "calls of"), (4, "bytes"), (6, "ms, the trace"), (8, "ms, the trace"), (9, "came last, the trace")):
        other = f"{float(row[group]) + 0.01:.3f}" if "." in row[group] else str(int(row[group]) + 1)
        damaged(words, (trace, picture, table[:row.start(group)] + other + table[row.end(group):]))
    damaged("groups of the table", (trace, picture, table[:row.start()] + table[table.index("\n", row.end()) + 1:]))

    def drawn(words, m, group, text):
        damaged(words, (trace, picture[:m.start(group)] + text + picture[m.end(group):], table))

    bars = list(re.finditer(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"[^>]*><title>([^:]*)([^<]*)</title></rect>\n', picture))
    tick, label = re.search(r"<text[^>]*>(\d+) (us|ms|s)</text>\n", picture), re.search(r'<text x="([\d.]+)"[^>]*>(rank 0)</text>\n<rect [^>]*fill="(#eee)"', picture)
    drawn("mismatched tag", bars[5], 0, bars[5][0].replace("</rect>", ""))
    drawn("outside of the picture", bars[-1], 3, "30000")
    drawn("a text outside", label, 1, "-1")
    drawn("an axis needs", re.search(r">(0)</text>", picture), 1, "")
    drawn("uneven steps", tick, 1, "7")
    drawn("labels of rank 0", label, 2, "rank")
    drawn("rank 0 has 0 tracks", label, 3, "#efefef")
    drawn("bars, ", bars[5], 0, "")
    drawn("bars, ", bars[5], 0, bars[5][0] * 2)
    drawn("bars of no track", bars[5], 0, bars[5][0] + bars[5][0].replace(f'y="{bars[5][2]}"', 'y="1.0"'))
    drawn("over another bar", bars[5], 1, bars[4][1])
    drawn("not where the axis says", max(bars, key=lambda b: float(b[3])), 3, "0")
    drawn(" is not ", bars[5], 5, "Nothing")
    drawn("who came last", bars[5], 6, bars[5][6].replace("came last", "went"))
    return n


def main():
    test, pipe = "--self-test" in sys.argv, "--pipe" in sys.argv
    paths = [path for path in sys.argv[1:] if not path.startswith("--")]
    if "--help" in sys.argv or len(paths) != 3:
        print(__doc__, file=sys.stdout if "--help" in sys.argv else sys.stderr)
        sys.exit(0 if "--help" in sys.argv else 2)
    try:
        files = [open(path, encoding="utf-8").read() for path in paths]
        calls, ranks = (check_pipe if pipe else check)(*files)
        print(f"{calls} {'actions' if pipe else 'calls'} on {ranks} ranks" + (f"; {(self_test_pipe if pipe else self_test)(*files)} kinds of damage are found" if test else ""))
    except (Bad, OSError, ValueError, KeyError, xml.ParseError) as error:
        sys.exit(f"trace.py: {error}")


if __name__ == "__main__":
    main()
