"""Records -> the HTML of what decisions do: where samples leave, which flip, which images; and the layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from anytime.page import data
from anytime.page.data import Decided, Group, form
from anytime.page.html import SORTED_FROM, Tables, esc
from anytime.page.pictures import Pictures
from anytime.tables import budget_said

Decisions = Sequence[tuple[Group, Decided]]


def shares(groups: Sequence[Group]) -> str:
    """A bar per form and budget: what share of the test samples leaves at each exit."""
    out, told = [], [(group, *data.shares(group)) for group in groups]
    most = max((len(share) for *_, lines in told for line in lines.values() for share in line.values()), default=0)
    for group, policy, budgets, lines in told:
        if not lines:
            continue
        head = "".join(f'<th scope="col">{esc(budget_said(*budget))}</th>' for budget in budgets)
        body = []
        for (who, arm), line in lines.items():
            cells = "".join(f"<td>{_bar(line[budget], most) if budget in line else '–'}" for budget in budgets)
            body.append(f'<tr><th scope="row">{esc(who)}{" <i>kept</i>" if arm == "kept" else ""}</th>{cells}')
        caption = f"{group.network} on {group.dataset}, {policy}: share of test samples that leaves at each exit"
        out.append(_framed(caption, f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody>", "bars"))
    if not out:
        return ""
    keys = "".join(f'<li><i class="key" style="--k:{_shade(k, most)}"></i>exit {k + 1}' for k in range(most))
    about = "<p>Thresholds fitted again after compression; <i>kept</i>: those of the reference. Columns are budgets.</p>"
    return f'{about}<ul class="keys">{keys}</ul>' + "\n".join(out)


def flips(decisions: Decisions) -> str:
    """A matrix per form and arm: the exits of the reference against those taken here."""
    out = []
    for group, found in decisions:
        small = []
        for network, arm, counts in data.flips(found):
            n, total = len(counts), max(1, int(counts.sum()))
            head = "".join(f'<th scope="col">{k + 1}</th>' for k in range(n))
            body = []
            for i, line in enumerate(counts):
                most = max(1, int(line.sum()))
                cells = "".join(
                    f'<td{"" if i != j else " class=same"} style="--k:{(c / most) ** 0.5:.2f}">{c}' for j, c in enumerate(line)
                )
                body.append(f'<tr><th scope="row">{i + 1}</th>{cells}')
            flipped = 1 - counts.trace() / total
            title = f"{form(network)}, {arm}: {100 * flipped:.2f} % flip"
            head = f'<tr><td class="corner">from ↓ to →</td>{head}</tr>'
            small.append(f"<table><caption>{esc(title)}</caption><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>")
        if small:
            out += [
                _heading(group, found),
                f'<div class="matrices" role="region" tabindex="0" aria-label="flips">{"".join(small)}</div>',
            ]
    about = (
        "<p>Test samples by the exit that they take in the reference (down) and here (across): on the diagonal nothing changed, "
        "left of it they leave earlier, right of it later. One training seed.</p>"
    )
    return about + "\n".join(out) if out else ""


def images(decisions: Decisions, pictures: Pictures) -> str:
    """The images that leave first and last, and the exit that each takes in every form."""
    out, missing = [], False
    for group, found in decisions:
        out.append(_heading(group, found))
        most = 1 + max(int(exits.max()) for _, _, exits, _ in found.taken)
        for title, indices in zip(("first", "last"), found.shown, strict=True):
            head = ""
            for i in map(int, indices):
                picture = pictures.html(found.digest, i)
                missing |= not picture
                label = pictures.label(found.digest, int(found.labels[i]))
                head += f'<th scope="col">{picture}<span>{esc(label)}</span><small>#{i}</small></th>'
            alike: dict[str, list[str]] = defaultdict(list)
            for network, arm, exits, right in found.taken:
                cells = (
                    f'<td style="--k:{_shade(int(exits[i]), most)}">{exits[i] + 1}{"" if right[i] else "<b>×</b>"}'
                    for i in map(int, indices)
                )
                alike["".join(cells)].append(esc(form(network)) + (" <i>kept</i>" if arm == "kept" else ""))
            body = [f'<tr><th scope="row">{_one_of(who, len(found.taken))}</th>{cells}' for cells, who in alike.items()]
            table = f"<thead><tr><th>leave {title}</th>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
            out.append(_framed(f"{group.network} on {group.dataset}: test images that leave {title}", table, "images"))
    if not out:
        return ""
    about = (
        "<p>The exit that each takes, in every form of the network; × marks a wrong answer. Images are ordered by the mean exit "
        "over all forms, then by how sure the reference is at its first exit; # is the index in the test part.</p>"
    )
    if missing:
        about += '<p class="notes">Some pictures are not kept in results/pictures: a run with --format html keeps them.</p>'
    return about + "\n".join(out)


def layers(groups: Sequence[Group], table: Tables) -> str:
    """A table per network."""
    out = []
    for group in groups:
        header, body = data.layers(group)
        if body:
            caption = f"{group.network} on {group.dataset}"
            html = table(header, body, f"Layers of {caption}", sortable=len(body) >= SORTED_FROM)
            out.append(f"<h3>{esc(caption)}</h3>{html}")
    about = (
        "<p>Bits of weights and activations, and the signal-to-quantization-noise ratio of the output where it was measured.</p>"
    )
    return about + "\n".join(out) if out else ""


def _heading(group: Group, found: Decided) -> str:
    budget = budget_said(found.asked.currency, found.asked.budget, found.asked.fitted_on)
    return f"<h3>{esc(group.network)} on {esc(group.dataset)}: {esc(found.asked.policy)}, budget {esc(budget)}</h3>"


def _one_of(who: Sequence[str], n: int) -> str:
    return f"all {n} forms" if len(who) == n > 1 else "<br>".join(who)


def _framed(caption: str, inside: str, kind: str) -> str:
    return (
        f'<div class="frame {kind}" role="region" aria-label="{esc(caption)}" tabindex="0">'
        f"<table><caption>{esc(caption)}</caption>{inside}</table></div>"
    )


def _shade(k: int, n: int) -> str:
    """From 0 for the first of n exits to 1 for the last."""
    return f"{k / max(1, n - 1):.2f}"


def _bar(share: Sequence[float], most: int) -> str:
    text = " / ".join(f"{100 * s:.1f}" for s in share)
    parts = "".join(f'<i style="width:{100 * s:.1f}%;--k:{_shade(k, most)}"></i>' for k, s in enumerate(share) if s)
    return f'<div class="bar">{parts}</div><small>{text}</small>'
