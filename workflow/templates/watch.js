"use strict";
// Asks for the parts of the page and puts in what has changed; asks for nothing while the page is not seen.
(() => {
  const every = 1000 * Number(document.body.dataset.every);
  const tags = {};
  const note = document.getElementById("note");
  let heard = Date.now();
  const say = (text, level) => {
    note.textContent = text;
    note.className = level;
  };
  const clock = (time) => new Date(time).toLocaleTimeString();
  const isMarked = (place) => {
    const chosen = getSelection();
    return chosen && !chosen.isCollapsed && place.contains(chosen.anchorNode);
  };
  async function update(place) {
    const answer = await fetch(place.id, {
      headers: { "If-None-Match": tags[place.id] || place.dataset.tag },
      cache: "no-store",
      signal: AbortSignal.timeout(20000),
    });
    if (answer.status === 404 || answer.status === 403) throw new Error("other");
    if (answer.status !== 200 && answer.status !== 304) throw new Error(answer.status);
    heard = Date.now();
    const as_of = "As of " + clock(heard - 1000 * Number(answer.headers.get("Age")));
    const trouble = decodeURIComponent(answer.headers.get("X-Trouble") || "");
    if (answer.status === 200 && !isMarked(place)) {
      place.innerHTML = await answer.text();
      tags[place.id] = answer.headers.get("ETag");
    }
    if (trouble) say(as_of + "; it cannot be read at the moment: " + trouble, "warn");
    else say(as_of, "muted");
  }
  async function look() {
    if (!document.hidden) {
      try {
        for (const place of document.querySelectorAll("[data-tag]")) await update(place);
      } catch (error) {
        const since = "What is shown is of " + clock(heard) + ". ";
        if (error.message === "other") say(since + "The watch has been started anew: open the address that it printed.", "bad");
        else say(since + "The watch does not answer: it has ended (start it again: make watch), or the ssh tunnel is closed.", "bad");
      }
    }
    setTimeout(look, every);
  }
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) for (const place of document.querySelectorAll("[data-tag]")) update(place).catch(() => {});
  });
  setTimeout(look, every);
})();
