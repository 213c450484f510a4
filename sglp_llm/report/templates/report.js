"use strict";
for (const drawing of document.querySelectorAll("svg[data-shown]")) {
  const shown = document.getElementById(drawing.dataset.shown);
  drawing.addEventListener("pointerover", event => {
    const title = event.target.querySelector("title") || event.target.parentNode.querySelector(":scope > title");
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
for (const table of document.querySelectorAll("table.sortable")) {
  const number = (row, column) => {
    const text = row.cells[column].textContent.replaceAll(",", "");
    return text === "" ? -Infinity : parseFloat(text);
  };
  table.querySelectorAll("th").forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const falls = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const rows = [...table.tBodies[0].querySelectorAll("tr:not(.fixed)")];
      rows.sort((a, b) => (falls ? -1 : 1) * (number(a, column) - number(b, column)));
      table.tBodies[0].append(...rows);
    });
  });
}
