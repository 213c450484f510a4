"use strict";
for (const drawing of document.querySelectorAll("svg[data-shown]")) {
  const shown = document.getElementById(drawing.dataset.shown);
  drawing.addEventListener("pointerover", event => {
    const title = event.target.querySelector("title");
    if (title) shown.textContent = title.textContent;
  });
}
const choice = document.getElementById("choice");
if (choice) {
  const choices = JSON.parse(choice.dataset.choices);
  const layers = document.querySelectorAll(".layers li");
  const show = () => {
    const [removed, left] = choices[choice.value];
    const gone = new Set(removed);
    layers.forEach((layer, index) => layer.classList.toggle("removed", gone.has(index)));
    document.getElementById("chosen").textContent = `${gone.size} of ${layers.length} layers would go: ${removed.join(" ") || "none"}. ${left}`;
  };
  choice.addEventListener("input", show);
}
for (const button of document.querySelectorAll("button[data-copies]")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copies).textContent.trim());
    button.textContent = "Copied";
  });
}
