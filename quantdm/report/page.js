// The rest of the page: another size, copies of the result, what is folded in when it is printed.
"use strict";
for (const box of document.querySelectorAll(".sizes")) {
  const sizes = JSON.parse(box.dataset.sizes);
  const range = box.querySelector("input");
  const dots = [...box.closest("section").querySelectorAll("[data-size]")];
  function show() {
    const { says, command } = sizes[Number(range.value)];
    box.querySelector(".says").textContent = says;
    box.querySelector("code").textContent = command;
    range.setAttribute("aria-valuetext", says);
    for (const dot of dots) dot.classList.toggle("picked", dot.dataset.size === range.value);
  }
  range.addEventListener("input", show);
  for (const dot of dots) {
    dot.addEventListener("click", () => {
      range.value = dot.dataset.size;
      show();
    });
  }
  box.hidden = false;
  show();
}

for (const buttons of document.querySelectorAll(".buttons")) {
  const said = buttons.querySelector("[aria-live]");
  const text = document.getElementById("markdown");
  buttons.querySelector(".copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      said.textContent = "Copied.";
    } catch {
      // not allowed here: open it and select it, so that one key copies it
      text.closest("details").open = true;
      getSelection().selectAllChildren(text);
      said.textContent = "Selected: copy it with your keyboard.";
    }
  });
  buttons.querySelector(".save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("data").textContent], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    said.textContent = "Saved as report.json.";
  });
  buttons.hidden = false;
}

{
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });
  // a link into what is folded away opens it
  const unfold = () => {
    const part = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    const fold = part && (part.closest("details") || part.querySelector(":scope > details"));
    if (fold) fold.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
}
