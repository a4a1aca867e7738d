// Compare two rows of samples: a slider shows one beside the other, equal seeds under the same place.
"use strict";
for (const box of document.querySelectorAll(".compare")) {
  const bands = [...box.parentElement.querySelectorAll(".band")];
  const stage = box.querySelector(".stage");
  const range = stage.querySelector("input");
  const [from, to] = ["from", "to"].map((side) => box.querySelector(`select.${side}`));
  const names = [...bands[0].querySelectorAll("img")].map((image) => image.dataset.row);
  const images = ["under", "over"].map((kind) => {
    const image = document.createElement("img");
    image.className = kind;
    stage.prepend(image);
    return image;
  });
  let band = 0;

  function source(name) {
    return [...bands[band].querySelectorAll("img")].find((image) => image.dataset.row === name);
  }

  function split() {
    const share = Number(range.value);
    images[1].style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    stage.querySelector(".handle").style.left = `${share}%`;
    range.setAttribute("aria-valuetext", `${share} per cent ${from.value}, the rest ${to.value}`);
    box.querySelector(".tag.from").hidden = share === 0;
    box.querySelector(".tag.to").hidden = share === 100;
  }

  function show() {
    // the right row lies below, the left one above it and is cut off at the handle
    [to.value, from.value].forEach((name, index) => {
      const found = source(name);
      images[index].src = found.src;
      images[index].alt = found.alt;
    });
    box.querySelector(".tag.from").textContent = from.value;
    box.querySelector(".tag.to").textContent = to.value;
    box.querySelector(".seeds").textContent = `Seeds ${bands[band].dataset.seeds}`;
    split();
  }

  for (const select of [from, to]) {
    for (const name of names) select.append(new Option(name, name));
    select.addEventListener("change", show);
  }
  [from.value, to.value] = [names[0], names.includes("recipe") ? "recipe" : names[names.length - 1]];
  range.addEventListener("input", split);
  box.querySelector(".flip").addEventListener("click", () => {
    range.value = Number(range.value) < 50 ? 100 : 0;
    split();
  });
  const turn = (by) => () => {
    band = (band + by + bands.length) % bands.length;
    show();
  };
  box.querySelector(".back").addEventListener("click", turn(-1));
  box.querySelector(".next").addEventListener("click", turn(1));
  stage.classList.toggle("pixelated", bands[0].parentElement.classList.contains("pixelated"));
  for (const button of box.querySelectorAll(".back, .next")) button.hidden = bands.length < 2;
  box.hidden = false;
  show();
  const grid = bands[0].closest("details");
  if (grid) grid.open = false; // what was the whole is the rest now
}
