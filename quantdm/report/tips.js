// Tips on the marks of every picture: under the pointer, under the finger, and with the arrow keys once it has focus.
"use strict";
{
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "status");
  const help = document.createElement("p");
  help.id = "tip-help";
  help.className = "unseen";
  help.textContent = "The arrow keys go from mark to mark.";
  document.querySelector("main").append(tip, help);
  let marked = null;

  function hide() {
    tip.classList.remove("on");
    if (marked) marked.classList.remove("marked");
    marked = null;
  }

  function show(mark) {
    hide();
    marked = mark;
    mark.classList.add("marked");
    tip.textContent = mark.dataset.tip;
    const at = mark.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(at.left + at.width / 2 - size.width / 2, 8), Math.max(room - size.width - 8, 8));
    const above = at.top - size.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : at.bottom + 8}px`;
    tip.classList.add("on");
  }

  for (const picture of document.querySelectorAll("svg")) {
    const marks = [...picture.querySelectorAll("title")].map((title) => {
      const mark = title.parentElement;
      mark.dataset.tip = title.textContent;
      title.remove(); // else the browser shows it a second time
      return mark;
    });
    if (!marks.length || picture.closest("[aria-hidden]")) continue;
    let at = -1;
    const map = picture.classList.contains("map");
    const stops = map ? marks.filter((mark) => mark.matches(".node")) : marks; // in the order of the data's flow
    let sorted = map;
    picture.tabIndex = 0;
    picture.setAttribute("aria-describedby", "tip-help");
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -marks.length, End: marks.length };
      if (!(event.key in step)) return;
      event.preventDefault();
      if (!sorted) stops.sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left);
      sorted = true;
      at = Math.min(Math.max(at + step[event.key], 0), stops.length - 1);
      stops[at].scrollIntoView({ block: "nearest", inline: "nearest" });
      show(stops[at]);
    });
    picture.addEventListener("blur", hide);
  }

  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest("[data-tip]");
    if (mark) show(mark);
    else if (marked && document.activeElement !== marked.closest("svg")) hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });
  document.addEventListener("scroll", () => marked && document.activeElement !== marked.closest("svg") && hide(), {
    passive: true,
  });
}
