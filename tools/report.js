document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const sign = heading.ariaSort === "ascending" ? -1 : 1;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const order = ([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // what is not defined comes last, either way
      return sign * (column ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    };
    body.append(...[...body.rows].map((row) => [key(row, column), row]).sort(order).map(([, row]) => row));
  }));
});
