// The numbers of a long run: lines through points, a table, a drawing.

/** The least-squares line through `[x, y]` points: `{slope, at}` where `at(x)` is its height. */
export function line(points) {
  const n = points.length;
  const mean = (axis) => points.reduce((sum, point) => sum + point[axis], 0) / n;
  const [mx, my] = [mean(0), mean(1)];
  const sxx = points.reduce((sum, [x]) => sum + (x - mx) ** 2, 0);
  const sxy = points.reduce((sum, [x, y]) => sum + (x - mx) * (y - my), 0);
  const slope = sxx === 0 ? 0 : sxy / sxx;
  return { slope, at: (x) => my + slope * (x - mx) };
}

/** An SVG with one panel per `{title, unit, series: [{name, points}]}`, points as `[minutes, value]`. */
export function draw(panels, { width = 900, height = 240 } = {}) {
  const colours = ['#1b6ca8', '#c8553d', '#3a7d44', '#7b4b94', '#8a6d3b'];
  const left = 70;
  const parts = panels.map((panel, at) => {
    const all = panel.series.flatMap((one) => one.points);
    const [xMax, yMax] = [0, 1].map((axis) => Math.max(1e-9, ...all.map((point) => point[axis])) * (axis ? 1.1 : 1));
    const x = (value) => left + (value / xMax) * (width - left - 20);
    const y = (value) => 34 + (1 - value / yMax) * (height - 64);
    const grid = [0, 0.25, 0.5, 0.75, 1].map((part) => {
      const value = yMax * part;
      const label = `<text x="${left - 6}" y="${y(value) + 4}" text-anchor="end">${short(value)}</text>`;
      const minute = `<text x="${x(xMax * part)}" y="${height - 12}" text-anchor="middle">${short(xMax * part)} min</text>`;
      return `<line x1="${left}" x2="${width - 20}" y1="${y(value)}" y2="${y(value)}" stroke="#ddd"/>${label}${minute}`;
    });
    const lines = panel.series.map((one, n) => {
      const path = one.points.map(([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`).join(' ');
      const colour = colours[n % colours.length];
      const name = `<text x="${left + 250 + n * 110}" y="20" fill="${colour}">${one.name}</text>`;
      return `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="1.5"/>${name}`;
    });
    const title = `<text x="${left}" y="20" font-weight="bold">${panel.title} (${panel.unit})</text>`;
    return `<g transform="translate(0 ${at * height})">${title}${grid.join('')}${lines.join('')}</g>`;
  });
  const size = `width="${width}" height="${height * panels.length}"`;
  return `<svg xmlns="http://www.w3.org/2000/svg" ${size} font-family="sans-serif" font-size="11">`
    + `<rect width="100%" height="100%" fill="white"/>${parts.join('')}</svg>\n`;
}

/** Rows of cells as text in columns, the first row as their heads. */
export function table(rows) {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => String(row[column]).length)));
  return rows.map((row) => row.map((cell, column) => String(cell).padStart(widths[column])).join('  ')).join('\n');
}

function short(value) {
  return value >= 100 ? Math.round(value) : Number(value.toPrecision(2));
}
