document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const sign = heading.ariaSort === "ascending" ? -1 : 1;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const compare = (a, b) => key(a, column).localeCompare(key(b, column), undefined, { numeric: true });
    const number = (row) => Number(key(row, column));
    const numeric = column > 0;
    body.append(...[...body.rows].sort((a, b) => sign * (numeric ? number(a) - number(b) : compare(a, b))));
  }));
});
