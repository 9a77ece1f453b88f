"""The live page's only script, and the policy that lets a browser run that one and no other."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

EVERY_SECONDS: Final = 5
"""How often a page that is looked at asks for the newest one."""

SCRIPT: Final = """
"use strict";
const note = document.getElementById("live"), calm = note.textContent;
const parts = ["header.top", "main", "footer"];
const name = (one) => one.id || one.getAttribute("href") || one.getAttribute("aria-label")
  || one.closest("tr")?.id || "";

function say(text) {
  if (note.textContent !== text) note.textContent = text;
  note.classList.toggle("amber", text !== calm);
}

function take(next) {
  if (!parts.every((part) => next.querySelector(part))) throw new Error("not a report");
  const open = [...document.querySelectorAll("details[open]")].map(name);
  const moved = new Map([...document.querySelectorAll(".scroll")].map(
    (one) => [name(one), one.scrollLeft]));
  const focus = document.activeElement, key = focus === document.body ? "" : name(focus);
  for (const part of parts)
    document.querySelector(part).replaceWith(document.adoptNode(next.querySelector(part)));
  document.title = next.title;
  for (const one of document.querySelectorAll("details"))
    if (open.includes(name(one))) one.open = true;
  for (const one of document.querySelectorAll(".scroll"))
    one.scrollLeft = moved.get(name(one)) || 0;
  if (key && !focus.isConnected)
    [...document.querySelectorAll(focus.tagName)].find((one) => name(one) === key)
      ?.focus({preventScroll: true});
}

async function look() {
  try {
    if (!document.hidden && getSelection().isCollapsed) {
      const answer = await fetch("/", {cache: "no-store", signal: AbortSignal.timeout(90000)});
      if (answer.status === 403)
        say("Not allowed any more: open the address that the run has printed, with its token.");
      else if (!answer.ok)
        say("The job directory does not answer: this page shows an earlier state.");
      else {
        take(new DOMParser().parseFromString(await answer.text(), "text/html"));
        say(calm);
      }
    }
  } catch {
    say("The run has ended, or cannot be reached: this page shows its last known state.");
  }
  setTimeout(look, EVERY);
}
setTimeout(look, EVERY);
""".replace("EVERY", f"{EVERY_SECONDS * 1000}")

_HASH: Final = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()

POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    f"script-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"
)
"""What the page may do; the header adds that no other page may frame it."""
