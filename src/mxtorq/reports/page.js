"use strict";
(() => {
  // Tables sort by the numbers in data-value, else by the text; cells without a number come last.
  const key = (row, at) => {
    const cell = row.cells[at];
    const value = cell.dataset.value;
    return value === undefined ? cell.textContent : Number(value);
  };
  const compare = (a, b, sign, numeric) => {
    if (numeric) {
      const [x, y] = [a, b].map((value) => typeof value === "number" && !Number.isNaN(value));
      if (!x || !y) return Number(y) - Number(x);
      return a === b ? 0 : sign * (a < b ? -1 : 1);
    }
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const numeric = head.classList.contains("number");
        const rows = [...body.rows].map((row) => [key(row, at), row]);
        rows.sort(([a], [b]) => compare(a, b, down ? -1 : 1, numeric));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  const theme = document.getElementById("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const shown = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = shown === "dark" ? "light" : "dark";
  });

  const save = document.getElementById("save");
  save.hidden = false;
  save.addEventListener("click", () => {
    const text = document.getElementById("record").textContent;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = save.dataset.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
})();
